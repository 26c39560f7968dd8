"""Cohorts depend on seed, round and names alone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.flower import select_cohort

NAMES = [f"client-{number:03d}" for number in range(40)]


def pick(names: list[str], **changes: object) -> tuple[str, ...]:
    return select_cohort(names, **{"fraction": 0.25, "seed": 3, "round_number": 2, **changes})  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(max_size=6), max_size=20), st.floats(0.01, 1.0), st.integers(0, 99), st.integers(1, 99))
def test_any_cohort_is_a_sorted_sample_whatever_the_order(
    names: set[str], fraction: float, seed: int, round_number: int
) -> None:
    found = select_cohort(sorted(names), fraction=fraction, seed=seed, round_number=round_number)
    assert list(found) == sorted(set(found))
    assert set(found) <= names
    assert min(1, len(names)) <= len(found) <= len(names)
    backwards = sorted(names, reverse=True)
    assert select_cohort(backwards, fraction=fraction, seed=seed, round_number=round_number) == found


@pytest.mark.parametrize(
    ("fraction", "size"), [(1.0, 40), (0.5, 20), (0.25, 10), (0.26, 11), (0.001, 1), (0.1, 4), (0.3, 12)]
)
def test_the_size_is_the_share_rounded_up(fraction: float, size: int) -> None:
    assert len(pick(NAMES, fraction=fraction)) == size


def test_a_share_that_is_exact_in_decimals_is_not_rounded_up_by_float64() -> None:
    """0.07 * 100 is 7.000000000000001 in float64."""
    assert len(pick([str(number) for number in range(100)], fraction=0.07)) == 7


def test_nobody_gives_nobody() -> None:
    assert pick([]) == ()


def test_rounds_and_seeds_differ() -> None:
    cohorts = {pick(NAMES, round_number=number) for number in range(1, 21)}
    assert len(cohorts) == 20
    assert pick(NAMES, seed=4) != pick(NAMES, seed=3)


def test_round_12_of_seed_1_is_not_round_2_of_seed_11() -> None:
    assert pick(NAMES, seed=1, round_number=12) != pick(NAMES, seed=11, round_number=2)


def test_global_random_numbers_have_no_part_and_are_left_alone() -> None:
    random.seed(0)
    first, state = pick(NAMES), random.getstate()
    random.seed(1)
    assert pick(NAMES) == first
    random.setstate(state)
    pick(NAMES)
    assert random.getstate() == state


def test_everybody_comes_about_equally_often() -> None:
    counts = dict.fromkeys(NAMES, 0)
    for number in range(1, 401):
        for name in pick(NAMES, round_number=number):
            counts[name] += 1
    assert 60 <= min(counts.values()) <= max(counts.values()) <= 140  # expected 100, standard deviation below 9


def test_a_newcomer_takes_at_most_one_place() -> None:
    before, after = set(pick(NAMES, fraction=0.5)), set(pick([*NAMES, "newcomer"], fraction=0.5))
    assert len(before - after) <= 1


def test_this_very_cohort_is_kept_across_releases() -> None:
    """A resumed run under another release must sample the same clients."""
    found = select_cohort(["a", "b", "c", "d", "e"], fraction=0.4, seed=0, round_number=1)
    assert found == ("a", "b")  # `printf '0\0001\000a' | sha256sum` and so on: the two smallest
