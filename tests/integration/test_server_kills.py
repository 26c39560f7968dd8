"""A run's server is killed at random moments and resumed: no version is lost, and no ledger says less than was done."""

import random

import pytest

from simulations.server_kills import Kills, kill_servers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Kills:
    seed = random.randrange(10_000)  # noqa: S311 - moments, not secrets
    print(f"seed {seed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path_factory.mktemp("clients")))
        return kill_servers(tmp_path_factory.mktemp("kills"), kills=10, seed=seed)


def test_ten_processes_were_killed(found: Kills) -> None:
    assert (found.kills, sum(found.by_scenario.values())) == (10, 10)


def test_no_version_is_lost(found: Kills) -> None:
    assert found.lost_versions == 0, found.faults


def test_no_ledger_says_less_than_was_done(found: Kills) -> None:
    assert found.undercounted_ledgers == 0, found.faults


def test_what_was_answered_is_sent_again_as_it_was(found: Kills) -> None:
    assert found.recomputed == 0, found.faults


def test_the_end_is_that_of_a_run_that_nobody_killed(found: Kills) -> None:
    assert found.other_ends == 0, found.faults


def test_nothing_else_was_wrong(found: Kills) -> None:
    assert found.faults == []
