"""``fedpeft privacy audit``, and a run that spends its budget."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.client_level import Clipped, NoisySum
from federated.tracking import read_events

APP = f"--app={Path(__file__).resolve().parents[3]}"
CLIENT = ("privacy=client_dp", "privacy.target_epsilon=0", "rounds=1")
TINY = ("experiment=tiny", "data.partition.num_clients=2", "train.steps=1", "engine.workers=1", "run_dir=out")


def test_it_prints_bound_threat_model_canaries_and_ceiling(fedpeft: Callable[..., Any]) -> None:
    done = fedpeft("privacy", "audit", APP, "--quick", *CLIENT, "privacy.client.noise_multiplier=2")
    assert "lower bound at 95 %" in done.out
    assert "200 canaries over 1 steps, target_delta 1e-05" in done.out
    assert "Threat model: sees the sum of all releases" in done.out
    assert done.out.count("nothing found") == 2
    assert "Where the ceiling is below" not in done.out


def test_sampled_cohorts_are_audited_as_they_are_drawn(fedpeft: Callable[..., Any]) -> None:
    sampled = ("privacy.client.sampling=poisson", "selection.fraction=0.5", "privacy.client.noise_multiplier=2")
    done = fedpeft("privacy", "audit", APP, "--quick", "--canaries=50", *CLIENT, *sampled)
    assert done.out.count("nothing found") == 2


def test_correlated_noise_is_audited_with_its_correlation_undone(
    fedpeft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = ("privacy.client.mechanism=banded", "selection.fraction=0.5", "privacy.client.noise_multiplier=4")
    options = (*CLIENT, *turns, "rounds=5", "--canaries=200", "--steps=3")
    done = fedpeft("privacy", "audit", APP, *options)
    assert done.out.count("nothing found") == 2
    assert "200 canaries over 3 steps" in done.out
    accounted = epsilon([GaussianSteps(4.0, 1.0, 2)], 1e-5)  # two participations in three rounds
    assert done.out.count(f" {accounted:.3g} ") == 2
    monkeypatch.setattr("federated.privacy.client_level.column_norm", lambda band: 1e-3)
    assert "BROKEN" in fedpeft("privacy", "audit", APP, *options, code=1).out


def test_both_units_are_audited_where_both_are_enabled(fedpeft: Callable[..., Any]) -> None:
    noise = ("privacy.client.noise_multiplier=2", "privacy.example.noise_multiplier=2")
    done = fedpeft("privacy", "audit", APP, "--quick", *CLIENT, "privacy=both", *noise)
    assert done.out.count("nothing found") == 4
    assert "example" in done.out


def test_noise_that_is_not_given_is_solved_for_as_a_client_does(fedpeft: Callable[..., Any]) -> None:
    done = fedpeft("privacy", "audit", APP, "--quick", "privacy=example_dp", "privacy.target_epsilon=3", "rounds=2")
    rows = [[cell.strip() for cell in line.split("│")] for line in done.out.splitlines() if "│ example" in line]
    assert len(rows) == 2
    assert all(2.99 < float(row[4]) <= 3.0 for row in rows), "what is accounted is the target"


def test_it_says_when_it_could_not_have_found_anything(fedpeft: Callable[..., Any]) -> None:
    done = fedpeft("privacy", "audit", APP, "--quick", *CLIENT, "privacy.client.noise_multiplier=0.5")
    assert "Where the ceiling is below the accounted epsilon" in done.out


def test_a_broken_mechanism_is_an_error(fedpeft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "federated.privacy.client_level.clip",
        lambda update, bound: Clipped({name: one.double() for name, one in update.items()}, 1.0, 1.0),
    )
    assert NoisySum
    done = fedpeft("privacy", "audit", APP, "--quick", *CLIENT, "privacy.client.noise_multiplier=4", code=1)
    assert "do not publish from this installation" in done.err
    assert "BROKEN" in done.out


def test_without_a_mechanism_there_is_nothing_to_audit(fedpeft: Callable[..., Any]) -> None:
    done = fedpeft("privacy", "audit", APP, "--quick", code=2)
    assert "add privacy=client_dp" in done.err


def test_a_run_ends_with_what_it_has_and_is_not_granted_more(fedpeft: Callable[..., Any], here: Path) -> None:
    """One round costs epsilon 4.73, two 7.14: a bound of 5 lets one pass, whoever asks again."""
    bound = ("privacy=client_dp", "privacy.target_epsilon=5")
    options = (*bound, "privacy.client.noise_multiplier=1", "rounds=3", "tracking.progress=false")
    fedpeft("simulate", APP, *TINY, *options)
    run = here / "out"
    end = [event for event in read_events(run / "metrics.jsonl") if event["event"] == "end"][-1]
    assert end["status"] == "completed"
    assert end["message"].startswith("budget spent before round 2 of 3: 1 rounds took epsilon 4.7")
    versions = json.loads((run / "versions.json").read_text())
    assert [version["round_number"] for version in versions] == [0, 1]
    ledger = (run / "privacy_ledger.jsonl").read_text().splitlines()
    fedpeft("simulate", APP, f"--resume={run}", "rounds=4")
    assert (run / "privacy_ledger.jsonl").read_text().splitlines() == ledger
    report = (run / "report.html").read_text()
    assert "epsilon, each client" in report
    assert "budget spent" in report


def test_a_resumed_run_needs_its_ledger(fedpeft: Callable[..., Any], here: Path) -> None:
    options = ("privacy=client_dp", "privacy.client.noise_multiplier=1", "rounds=1")
    fedpeft("simulate", APP, *TINY, *options, "privacy.target_epsilon=0", "tracking.progress=false")
    (here / "out" / "privacy_ledger.jsonl").unlink()
    done = fedpeft("simulate", APP, f"--resume={here / 'out'}", "rounds=2", code=1)
    assert "is missing" in done.err
