"""One client's rows are split the same way whatever else happens."""

import pytest

from federated.config import DataConfig
from federated.data.source import Pool, PooledSource, check_source, split_rows
from federated.errors import DataError

ROWS = [{"text": str(number)} for number in range(10)]


def test_the_split_holds_out_the_fraction_and_loses_no_row() -> None:
    data = split_rows(ROWS, DataConfig(test_fraction=0.3), client_id="a")
    assert (len(data.train), len(data.test)) == (7, 3)
    assert sorted(row["text"] for row in data.train + data.test) == [row["text"] for row in ROWS]


def test_the_split_depends_on_the_seed_and_the_client_only() -> None:
    first = split_rows(ROWS, DataConfig(seed=1), client_id="a")
    again = split_rows(ROWS, DataConfig(seed=1, max_clients=5), client_id="a")
    assert first == again
    assert first.test != split_rows(ROWS, DataConfig(seed=2), client_id="a").test
    assert first.test != split_rows(ROWS, DataConfig(seed=1), client_id="b").test


def test_caps_are_applied_after_the_split() -> None:
    whole = split_rows(ROWS, DataConfig(test_fraction=0.4), client_id="a")
    capped = split_rows(
        ROWS, DataConfig(test_fraction=0.4, max_train_per_client=2, max_test_per_client=1), client_id="a"
    )
    assert (capped.train, capped.test) == (whole.train[:2], whole.test[:1])


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_rows_give_one_of_each(fraction: float) -> None:
    data = split_rows(ROWS[:2], DataConfig(test_fraction=fraction), client_id="a")
    assert (len(data.train), len(data.test)) == (1, 1)


@pytest.mark.parametrize(("count", "words"), [(0, "no examples"), (1, "one example")])
def test_a_client_that_cannot_be_split_is_named(count: int, words: str) -> None:
    with pytest.raises(DataError, match=f"client 'clinic-7' has {words}; expected at least 2 .*data.min_per_client=3"):
        split_rows(ROWS[:count], DataConfig(), client_id="clinic-7")


def test_an_unknown_client_is_refused() -> None:
    source = PooledSource(Pool(("a",), lambda _: ROWS), DataConfig(), ())
    with pytest.raises(DataError, match=r"no client 'b' in data=synthetic; there are 1"):
        source.load("b")


def test_checking_a_source_loads_every_client() -> None:
    asked = []

    def rows(client_id: str) -> list[dict[str, str]]:
        asked.append(client_id)
        return ROWS

    check_source(PooledSource(Pool(("a", "b"), rows), DataConfig(), ()))
    assert asked == ["a", "b"]
