"""Fixed groups: reproducible, nobody's group depends on others, nobody is asked twice in as many rounds."""

import json
from collections import Counter
from pathlib import Path

import pytest

from federated.config.privacy import ClientPrivacyConfig
from federated.errors import PrivacyError
from federated.privacy.fixed_groups import FixedGroups, group_count, group_of, groups_of, too_few

NAMES = [f"client-{number:03d}" for number in range(200)]


@pytest.mark.parametrize(
    ("fraction", "groups"),
    [(1.0, 1), (0.7, 1), (0.6, 2), (0.5, 2), (0.4, 3), (0.34, 3), (0.25, 4), (0.1, 10), (1 / 3, 3), (0.001, 1000)],
)
def test_a_fraction_is_the_nearest_whole_number_of_groups(fraction: float, groups: int):
    assert group_count(fraction) == groups
    assert groups_of(ClientPrivacyConfig(mechanism="banded"), fraction) == groups
    assert groups_of(ClientPrivacyConfig(), fraction) == 1


@pytest.mark.parametrize("groups", [1, 2, 7, 10])
def test_everybody_is_asked_once_in_as_many_rounds_as_there_are_groups(groups: int):
    made = FixedGroups(NAMES, groups=groups, seed=3)
    asked = [made.of_round(number) for number in range(1, 3 * groups + 1)]
    for start in range(2 * groups + 1):  # in any so many rounds in a row
        assert sorted(one for cohort in asked[start : start + groups] for one in cohort) == NAMES
    assert asked[:groups] * 3 == asked


def test_a_client_s_group_does_not_depend_on_the_others():
    """Else the neighbour of a population, with one client less, would have another division altogether."""
    many, fewer = FixedGroups(NAMES, groups=5, seed=0), FixedGroups(NAMES[1:], groups=5, seed=0)
    for number in range(1, 6):
        assert set(many.of_round(number)) - set(fewer.of_round(number)) <= {NAMES[0]}
        assert set(fewer.of_round(number)) <= set(many.of_round(number))


def test_groups_are_about_equal_and_others_under_another_seed():
    sizes = Counter(group_of(f"client {number}", groups=8, seed=1) for number in range(8000))
    assert all(abs(size - 1000) < 150 for size in sizes.values())  # five standard deviations
    again = FixedGroups(reversed(NAMES), groups=4, seed=1)
    assert again.of_round(1) == FixedGroups(NAMES, groups=4, seed=1).of_round(1)
    assert again.of_round(1) != FixedGroups(NAMES, groups=4, seed=2).of_round(1)


def test_fewer_clients_than_groups_are_refused():
    assert too_few(10, groups=10) == ""
    with pytest.raises(PrivacyError, match=r"4 clients in 10 groups .* selection.fraction=0.25 or above"):
        FixedGroups(NAMES[:4], groups=10, seed=0)
    with pytest.raises(PrivacyError, match="0 clients in 1 groups"):
        FixedGroups([], groups=1, seed=0)


def test_a_run_that_goes_on_has_the_same_groups(tmp_path: Path):
    path = tmp_path / "groups.json"
    first = FixedGroups.of_run(path, NAMES, groups=4, seed=7, fresh=True)
    again = FixedGroups.of_run(path, ["somebody new", *NAMES[3:]], groups=4, seed=7, fresh=False)
    assert again.population == first.population == tuple(NAMES)
    assert [again.of_round(number) for number in range(1, 9)] == [first.of_round(number) for number in range(1, 9)]
    early = FixedGroups.of_run(path, ["somebody new"], groups=4, seed=7, fresh=True)  # stopped before its first charge
    assert early.population == tuple(NAMES)


@pytest.mark.parametrize(("groups", "seed"), [(5, 7), (4, 8)])
def test_another_division_is_refused(tmp_path: Path, groups: int, seed: int):
    path = tmp_path / "groups.json"
    FixedGroups.of_run(path, NAMES, groups=4, seed=7, fresh=True)
    with pytest.raises(PrivacyError, match="4 groups by seed 7"):
        FixedGroups.of_run(path, NAMES, groups=groups, seed=seed, fresh=False)


def test_a_missing_file_is_an_error_once_somebody_was_charged(tmp_path: Path):
    with pytest.raises(PrivacyError, match="put it back"):
        FixedGroups.of_run(tmp_path / "groups.json", NAMES, groups=4, seed=7, fresh=False)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"groups": "many", "seed": 0, "population": ["a"]}', "\xff"])
def test_a_damaged_file_ends_the_run(tmp_path: Path, text: str):
    path = tmp_path / "groups.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(PrivacyError, match="damaged"):
        FixedGroups.of_run(path, NAMES, groups=4, seed=7, fresh=False)


def test_a_file_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(PrivacyError, match="put it back"):
        FixedGroups.of_run(tmp_path / "nowhere" / "groups.json", NAMES, groups=4, seed=7, fresh=True)


def test_what_it_keeps_can_be_read(tmp_path: Path):
    path = tmp_path / "groups.json"
    FixedGroups.of_run(path, NAMES[:3], groups=2, seed=7, fresh=True)
    assert json.loads(path.read_text()) == {"groups": 2, "seed": 7, "population": NAMES[:3]}
