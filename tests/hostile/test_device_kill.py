"""An agent is killed at random moments of download, install, activation and commit: what serves is verified."""

import pytest

from simulations.device_kills import PHASES, kill_agents


@pytest.mark.slow
def test_ten_kills_always_leave_a_device_that_serves(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = kill_agents(tmp_path, kills=10, seed=20260101)
    assert found.faults == []
    assert (found.kills, set(found.by_phase.values())) == (10, {2})
    assert set(found.by_phase) == set(PHASES)
    assert found.resumed > 0
    assert found.null < 10
