"""Cohorts depend on seed, round and names, and under two policies on what earlier rounds taught about the clients."""

import itertools
import math
import random
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.flower import select_cohort
from federated.flower.selection import POLICIES, Standing, order_clients

every_policy = pytest.mark.parametrize("policy", sorted(POLICIES))
standing = st.builds(Standing, st.integers(0, 10**6), st.lists(st.booleans(), max_size=8).map(tuple))

NAMES = [f"client-{number:03d}" for number in range(40)]


def pick(names: list[str], **changes: object) -> tuple[str, ...]:
    return select_cohort(names, **{"fraction": 0.25, "seed": 3, "round_number": 2, **changes})  # type: ignore[arg-type]


@every_policy
@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(max_size=6), st.none() | standing, max_size=20),
    st.floats(0.01, 1.0),
    st.integers(0, 99),
    st.integers(1, 99),
)
def test_any_cohort_is_a_sorted_sample_whatever_the_order(
    policy: str, clients: dict[str, Standing | None], fraction: float, seed: int, round_number: int
) -> None:
    names, standings = set(clients), {name: one for name, one in clients.items() if one is not None}

    def select(given: list[str], known: list[str]) -> tuple[str, ...]:
        return select_cohort(
            given,
            fraction=fraction,
            seed=seed,
            round_number=round_number,
            policy=policy,
            standings={name: standings[name] for name in known},
        )

    found = select(sorted(names), sorted(standings))
    assert list(found) == sorted(set(found))
    assert set(found) <= names
    assert min(1, len(names)) <= len(found) <= len(names)
    assert select(sorted(names, reverse=True), sorted(standings, reverse=True)) == found


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


class TestRoundRobin:
    @settings(max_examples=60, deadline=None)
    @given(st.sets(st.text(max_size=6), min_size=1, max_size=12), st.floats(0.01, 1.0), st.integers(1, 50))
    def test_everybody_gets_a_turn(self, names: set[str], fraction: float, first: int):
        def cohorts(count: int) -> list[tuple[str, ...]]:
            return [
                select_cohort(names, fraction=fraction, seed=1, round_number=number, policy="round_robin")
                for number in range(first, first + count)
            ]

        size = len(cohorts(1)[0])
        assert set(itertools.chain(*cohorts(math.ceil(len(names) / size)))) == names
        assert Counter(itertools.chain(*cohorts(len(names)))) == dict.fromkeys(names, size)

    def test_each_round_goes_on_where_the_last_one_ended(self):
        asked = [pick(NAMES, policy="round_robin", fraction=0.3, round_number=number) for number in range(1, 6)]
        assert [len(set(one) & set(other)) for one, other in itertools.pairwise(asked)] == [0, 0, 0, 0]
        whole = order_clients(NAMES, size=12, seed=3, round_number=1, policy="round_robin")
        assert set(asked[3]) == {*whole[36:], *whole[:8]}

    def test_another_seed_is_another_order(self):
        assert pick(NAMES, policy="round_robin", seed=4) != pick(NAMES, policy="round_robin", seed=3)


def chi_square(found: Counter[tuple[str, ...]], shares: dict[tuple[str, ...], float]) -> float:
    total = found.total()
    return sum((found[key] - total * share) ** 2 / (total * share) for key, share in shares.items())


class TestByExamples:
    WEIGHTS: ClassVar[dict[str, int]] = {"a": 1, "b": 2, "c": 3, "d": 6}

    def test_the_first_two_are_drawn_by_their_share_of_what_is_left(self):
        """P(i then j) = w_i / W * w_j / (W - w_i): 12 outcomes, chi-square with 11 degrees of freedom."""
        standings = {name: Standing(count) for name, count in self.WEIGHTS.items()}
        orders = [
            order_clients(self.WEIGHTS, size=2, seed=5, round_number=number, policy="by_examples", standings=standings)
            for number in range(1, 6001)
        ]
        total = sum(self.WEIGHTS.values())
        shares = {
            (one, other): left / total * right / (total - left)
            for (one, left), (other, right) in itertools.permutations(self.WEIGHTS.items(), 2)
        }
        assert sum(shares.values()) == pytest.approx(1.0)
        assert chi_square(Counter((order[0], order[1]) for order in orders), shares) < 24.7  # its 99 % point
        uniform = Counter(
            tuple(order_clients(self.WEIGHTS, size=2, seed=5, round_number=number)[:2]) for number in range(1, 6001)
        )
        assert chi_square(uniform, shares) > 1000
        assert chi_square(uniform, dict.fromkeys(shares, 1 / 12)) < 24.7

    @pytest.mark.parametrize("number", range(1, 30))
    def test_equal_counts_are_uniform(self, number: int):
        standings = dict.fromkeys(NAMES, Standing(7))
        weighted = pick(NAMES, round_number=number, policy="by_examples", standings=standings)
        assert weighted == pick(NAMES, round_number=number)
        assert weighted == pick(NAMES, round_number=number, policy="by_examples")  # nothing is known yet

    @pytest.mark.parametrize("number", range(1, 30))
    def test_who_is_not_known_counts_as_the_mean_of_those_who_are_there(self, number: int):
        known = {name: Standing(count) for name, count in zip(NAMES, range(1, 20), strict=False)}  # mean 10
        gone = {"gone": Standing(10**6)}
        told = known | dict.fromkeys(NAMES[19:], Standing(10))
        found = pick(NAMES, round_number=number, policy="by_examples", standings=known | gone)
        assert found == pick(NAMES, round_number=number, policy="by_examples", standings=told)

    def test_only_a_good_update_tells_a_count(self):
        assert Standing().after(good=False, examples=9).examples == 0
        assert Standing(5).after(good=False, examples=9).examples == 5
        assert Standing(5).after(good=True, examples=9).examples == 9


class TestAvailability:
    @pytest.mark.parametrize(
        ("answers", "share"),
        [((), 1.0), ((True,) * 8, 1.0), ((False,) * 8, 1 / 9), ((True, False), 2 / 3), ((False,) * 100, 1 / 9)],
    )
    def test_it_is_the_share_of_the_last_eight_that_were_good(self, answers: tuple[bool, ...], share: float):
        found = Standing()
        for good in answers:
            found = found.after(good=good, examples=1)
        assert found.availability == share

    def test_old_failures_are_forgotten(self):
        found = Standing(answers=(False,) * 8)
        for _ in range(8):
            found = found.after(good=True, examples=1)
        assert found.availability == 1.0

    def test_who_answers_is_asked_more_often_and_nobody_never(self):
        standings = {name: Standing(answers=(number < 20,) * 8) for number, name in enumerate(NAMES)}
        counts: Counter[str] = Counter()
        for number in range(1, 201):
            counts.update(pick(NAMES, round_number=number, policy="availability", standings=standings))
        good, bad = ([counts[name] for name in part] for part in (NAMES[:20], NAMES[20:]))
        assert min(good) > max(bad)
        assert min(bad) > 0


@pytest.mark.parametrize(
    ("policy", "cohort"), [("round_robin", ("c", "d")), ("by_examples", ("a", "c")), ("availability", ("a", "c"))]
)
def test_these_cohorts_too_are_kept_across_releases(policy: str, cohort: tuple[str, ...]) -> None:
    standings = {"b": Standing(3, (False, False)), "c": Standing(40), "d": Standing(1, (True,))}
    found = select_cohort(
        ["a", "b", "c", "d", "e"], fraction=0.4, seed=0, round_number=1, policy=policy, standings=standings
    )
    assert found == cohort
