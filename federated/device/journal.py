"""The device's journal: which version is in which state, which one answers, and what to go back to.

    discovered -> downloading -> verified -> staged -> probing -> probation -> committed
                                                       any of these -> failed

One file, replaced as a whole by each change (written beside, flushed, renamed): after a kill or a power cut the old
journal is there, or the new one. Only the agent that holds the state folder writes it; anybody may read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from federated.config import STRICT
from federated.device.slots import NULL
from federated.errors import DeviceError
from federated.files import sync_folder
from federated.manifest import canonical_json
from federated.release.disk import read_file, translated, write_file

__all__ = ["FAILED", "FILE", "Book", "Entry", "Journal", "Reply", "State", "read_book"]

State = Literal["discovered", "downloading", "verified", "staged", "probing", "probation", "committed", "failed"]
FAILED: State = "failed"
FILE = "journal.json"
FORMAT = 1
_MOST_ENTRIES, _LONGEST_TRAIL, _MOST_REPLIES, _LONGEST_REASON = 100, 8, 20, 1000


@dataclass(frozen=True, config=STRICT)
class Entry:
    """One version.

    Args:
        version_id: its id.
        state: the furthest that it came; a version that was replaced stays ``committed``.
        channel: where it was found.
        record: what was signed of it, as plain data.
        reason: why it failed, or why a step has to be tried again.
        code: name of the error behind that.
        times: when it entered each state last, ISO 8601 in UTC.
        attempts: how often it was begun to be probed without an outcome: the device went down meanwhile.
    """

    version_id: str
    state: State
    channel: str = ""
    record: dict[str, Any] = Field(default_factory=dict)
    reason: str = ""
    code: str = ""
    times: dict[str, str] = Field(default_factory=dict)
    attempts: int = 0


@dataclass(frozen=True, config=STRICT)
class Reply:
    """What became of a command.

    Args:
        name: of the command.
        done: whether it was carried out.
        message: what was done, or why not.
    """

    name: str
    done: bool
    message: str


@dataclass(frozen=True, config=STRICT)
class Book:
    """All that the journal says.

    Args:
        format: of the file.
        active: version that answers, or ``"null"``.
        trail: versions that answered before, the next one to go back to last.
        good: versions that were committed, the last known good one last.
        pinned: version at which somebody holds the device; ``""``: it follows its channel.
        declined: the channel's version that somebody overrode by hand; ``""``: none.
        offered: the channel's version when it was looked at last.
        boots: starts since the last commit, sign of health or orderly end.
        polled_at: when the source was asked last.
        fresh_until: when the metadata end that were verified last.
        trouble: why the last look at the source failed; ``""``: it did not.
        replies: to the last commands.
        versions: by id.
    """

    format: Literal[1] = 1
    active: str = NULL
    trail: tuple[str, ...] = ()
    good: tuple[str, ...] = ()
    pinned: str = ""
    declined: str = ""
    offered: str = ""
    boots: int = 0
    polled_at: str = ""
    fresh_until: str = ""
    trouble: str = ""
    replies: tuple[Reply, ...] = ()
    versions: dict[str, Entry] = Field(default_factory=dict)

    def state(self, version_id: str) -> State | None:
        """Of a version; None if the journal does not know it."""
        entry = self.versions.get(version_id)
        return None if entry is None else entry.state

    def bounded(self) -> Self:
        """The same without what nobody needs any more: the oldest entries, steps of the trail and replies."""
        needed = {self.active, self.pinned, self.declined, self.offered, *self.trail, *self.good}
        by_age = sorted(self.versions.values(), key=lambda one: max(one.times.values(), default=""))
        old = [one.version_id for one in by_age if one.version_id not in needed]
        gone = set(old[: max(0, len(self.versions) - _MOST_ENTRIES)])
        return dataclasses.replace(
            self,
            trail=self.trail[-_LONGEST_TRAIL:],
            good=self.good[-_LONGEST_TRAIL:],
            replies=self.replies[-_MOST_REPLIES:],
            versions={name: one for name, one in self.versions.items() if name not in gone},
        )


_BOOK: TypeAdapter[Book] = TypeAdapter(Book)


def read_book(folder: Path) -> Book | None:
    """What the journal in a state folder says; None if there is none.

    Raises:
        DeviceError: if it is damaged, or of a newer library.
        ReleaseError: if it cannot be read.
    """
    with translated("read the journal"):
        data = read_file(folder / FILE)
    if data is None:
        return None
    try:
        return _BOOK.validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        raise DeviceError(
            f"{folder / FILE} is no journal that this library reads ({where}: {fault['msg']}): it is damaged, or of a "
            f"newer federated-peft; put it away, and the device begins with the null adapter and fetches again"
        ) from None


class Journal:
    """The journal of the agent that holds a state folder.

    Args:
        folder: made when something is written.
        clock: the time, with its zone.

    Raises:
        DeviceError, ReleaseError: see `read_book`.
    """

    def __init__(self, folder: Path, clock: Callable[[], datetime]) -> None:
        self._folder = folder
        self._clock = clock
        self._book = read_book(folder) or Book()

    @property
    def book(self) -> Book:
        """What it says now."""
        return self._book

    def change(self, **fields: Any) -> None:
        """Replace fields of the book, on the disk first.

        Raises:
            ReleaseError: if the disk refuses; then nothing was changed.
        """
        book = dataclasses.replace(self._book, **fields).bounded()
        with translated("write the journal"):
            write_file(self._folder / FILE, canonical_json(dataclasses.asdict(book)))
            sync_folder(self._folder)
        self._book = book

    def enter(self, version_id: str, state: State, *, entry: Mapping[str, Any] | None = None, **fields: Any) -> None:
        """Move a version into a state, and change the book in the same write.

        Args:
            version_id: known, or new.
            state: to be entered now.
            entry: fields of the entry to replace; reason and code are cleared unless they are given.
            fields: of the book.

        Raises:
            ReleaseError: see `change`.
        """
        known = self._book.versions.get(version_id) or Entry(version_id, state)
        told = {"reason": "", "code": "", **(entry or {})}
        told["reason"] = str(told["reason"])[:_LONGEST_REASON]
        times = known.times | {state: self._clock().isoformat(timespec="seconds")}
        moved = dataclasses.replace(known, state=state, times=times, **told)
        self.change(versions=self._book.versions | {version_id: moved}, **fields)
