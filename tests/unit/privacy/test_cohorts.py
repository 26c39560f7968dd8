"""Cohorts from a secret key: independent, never twice, and the key in one file alone."""

import json
import os
from pathlib import Path

import pytest

from federated.errors import PrivacyError
from federated.privacy.cohorts import PoissonCohorts, open_cohort

NAMES = [f"client-{number:03d}" for number in range(200)]


def test_each_client_is_drawn_independently_with_its_probability():
    cohorts = PoissonCohorts(NAMES, key=b"k" * 32)
    drawn = [cohorts.draw(0.3) for _ in range(200)]
    sizes = [len(one) for one in drawn]
    mean = sum(sizes) / len(sizes)
    variance = sum((size - mean) ** 2 for size in sizes) / len(sizes)
    assert mean == pytest.approx(60, abs=2)
    assert variance == pytest.approx(200 * 0.3 * 0.7, rel=0.4)  # a fixed size would have none
    together = sum("client-000" in one and "client-001" in one for one in drawn)
    assert together == pytest.approx(18, abs=14)


def test_everybody_or_nobody():
    assert PoissonCohorts(NAMES).draw(1.0) == tuple(NAMES)
    assert PoissonCohorts(["a"], key=b"k" * 32).draw(1e-12) == ()


def test_nobody_can_foresee_them():
    assert PoissonCohorts(NAMES).draw(0.5) != PoissonCohorts(NAMES).draw(0.5)


def test_a_run_that_goes_on_draws_no_cohort_twice(tmp_path: Path):
    path = tmp_path / "cohorts.key"
    one = PoissonCohorts.of_run(path, NAMES)
    first = [one.draw(0.5) for _ in range(3)]
    again = PoissonCohorts.of_run(path, ["somebody new"])
    assert again.population == tuple(NAMES)
    assert again.draw(0.5) not in first
    known = PoissonCohorts(NAMES, key=bytes.fromhex(json.loads(path.read_text())["key"]))
    assert [known.draw(0.5) for _ in range(3)] == first


def test_a_draw_is_written_down_before_it_is_used(tmp_path: Path):
    path = tmp_path / "cohorts.key"
    cohorts = PoissonCohorts.of_run(path, NAMES)
    cohorts.draw(0.5)
    assert json.loads(path.read_text())["drawn"] == 1


def test_the_key_s_file_is_its_owner_s_alone(tmp_path: Path):
    path = tmp_path / "cohorts.key"
    before = os.umask(0)
    try:
        PoissonCohorts.of_run(path, NAMES).draw(0.5)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(PrivacyError, match="others can read the key"):
        PoissonCohorts.of_run(path, NAMES)


def test_its_key_is_not_shown(tmp_path: Path):
    path = tmp_path / "cohorts.key"
    cohorts = PoissonCohorts.of_run(path, NAMES)
    assert repr(cohorts) == "PoissonCohorts(200 clients)"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"key": "zz", "drawn": 0, "population": ["a"]}'])
def test_a_damaged_file_ends_the_run(tmp_path: Path, text: str):
    path = tmp_path / "cohorts.key"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(PrivacyError, match="damaged"):
        PoissonCohorts.of_run(path, NAMES)


def test_no_clients_or_a_short_key_are_refused():
    with pytest.raises(PrivacyError, match="at least one client"):
        PoissonCohorts([])
    with pytest.raises(PrivacyError, match="16 bytes"):
        PoissonCohorts(NAMES, key=b"short")


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path):
    with pytest.raises(PrivacyError, match="may come twice"):
        PoissonCohorts.of_run(tmp_path / "nowhere" / "cohorts.key", NAMES)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(PrivacyError, match="cannot be drawn without it"):
        PoissonCohorts.of_run(folder, NAMES)


def test_a_client_that_leaves_an_open_cohort_brings_nobody_in():
    clients = [f"client-{number:03d}" for number in range(200)]
    sizes = []
    for number in range(1, 31):
        cohort = open_cohort(clients, fraction=0.1, seed=3, round_number=number)
        sizes.append(len(cohort))
        assert cohort == tuple(sorted(cohort))
        for gone in cohort:
            left = [name for name in clients if name != gone]
            assert set(open_cohort(left, fraction=0.1, seed=3, round_number=number)) == set(cohort) - {gone}
    assert 17 < sum(sizes) / 30 < 23
    assert open_cohort(clients, fraction=1.0, seed=3, round_number=1) == tuple(clients)
    assert open_cohort(clients, fraction=0.1, seed=4, round_number=1) != open_cohort(
        clients, fraction=0.1, seed=3, round_number=1
    )
