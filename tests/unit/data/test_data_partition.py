"""Clients made anew: nothing lost, nothing twice, reproducible, and said."""

from typing import Any

import pytest

from federated.config import DataConfig, PartitionConfig
from federated.data.partition import partition_rows
from federated.data.source import Pool
from federated.errors import DataError

ROWS = [{"text": str(number), "label": number % 3} for number in range(60)]


def divide(kind: str, rows: Any = ROWS, *, seed: int = 0, **partition: Any) -> Pool:
    config = DataConfig(partition=PartitionConfig(kind=kind, **partition), seed=seed)
    return partition_rows(rows, config, notes=("before",))


def texts(pool: Pool) -> dict[str, list[str]]:
    return {client_id: [row["text"] for row in pool.rows(client_id)] for client_id in pool.client_ids}


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_every_row_goes_to_one_client(kind: str) -> None:
    pool = divide(kind, num_clients=6)
    assert sorted(text for got in texts(pool).values() for text in got) == sorted(row["text"] for row in ROWS)
    assert pool.counts == {client_id: len(got) for client_id, got in texts(pool).items()}


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_the_same_seed_divides_alike_and_another_does_not(kind: str) -> None:
    assert texts(divide(kind, num_clients=4)) == texts(divide(kind, num_clients=4))
    assert texts(divide(kind, num_clients=4)) != texts(divide(kind, num_clients=4, seed=1))


def test_iid_deals_evenly_and_shuffled() -> None:
    dealt = texts(divide("iid", num_clients=6))
    assert [len(got) for got in dealt.values()] == [10] * 6
    assert dealt["client-000"] != [str(number) for number in range(10)]


def test_names_sort_as_numbers() -> None:
    rows = [{"text": "x"}] * 1200
    names = divide("iid", rows, num_clients=1100).client_ids
    assert names == tuple(sorted(names))
    assert (names[0], names[-1]) == ("client-0000", "client-1099")


def test_pathological_clients_have_the_asked_number_of_labels() -> None:
    pool = divide("pathological", num_clients=6, classes_per_client=1)
    assert [len({row["label"] for row in pool.rows(name)}) for name in pool.client_ids] == [1] * 6


def test_small_alpha_is_more_skewed_than_large() -> None:
    def largest(alpha: float) -> int:
        return max(len(got) for got in texts(divide("dirichlet", num_clients=6, alpha=alpha)).values())

    assert largest(0.05) > largest(1000.0)


def test_clients_without_rows_are_left_out_and_named() -> None:
    pool = divide("dirichlet", num_clients=12, alpha=0.01)
    assert 0 < len(pool.client_ids) < 12
    missing = sorted({f"client-{number:03d}" for number in range(12)} - set(pool.client_ids))
    assert pool.notes == ("before", f"left out {len(missing)} clients that got no rows: {', '.join(missing)}")


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_more_clients_than_rows_is_an_error(kind: str) -> None:
    with pytest.raises(DataError, match=r"data\.partition\.num_clients=4 is more than the 3 rows"):
        divide(kind, ROWS[:3], num_clients=4)


def test_labels_that_nobody_gets_are_noted() -> None:
    pool = divide("pathological", num_clients=2, classes_per_client=1)
    assert any("will NOT be used" in note for note in pool.notes)


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_rows_without_labels_cannot_be_skewed_by_label(kind: str) -> None:
    with pytest.raises(DataError, match=f"data.partition.kind={kind} needs labels"):
        divide(kind, [{"text": "to be"}] * 4)


def test_an_impossible_division_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^data.partition: 60 rows cannot be divided so: .*greater than the number"):
        divide("pathological", num_clients=2, classes_per_client=5)
