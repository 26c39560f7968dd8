"""Correlated noise over fixed groups in whole rounds of Flower messages: turns, noise that goes on, kill and resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from federated.errors import AggregationError, PrivacyError, RunInterrupted
from federated.flower.publisher import RegistryPublisher, TrainingState
from federated.flower.records import packet_of
from federated.flower.server_privacy import ServerPrivacy
from federated.manifest import VersionManifest
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.banded import column_norm, inverse_column
from federated.privacy.chance import NoiseSource
from federated.privacy.fixed_groups import group_of

Make = Callable[..., Any]
SIZE = 2 * 3 + 2 * 2
START = torch.tensor([0.25] * 6 + [-0.25] * 4, dtype=torch.float64)
NAMES = [f"client-{number:03d}" for number in range(8)]


def banded(fraction: float = 0.5, **changes: Any) -> dict[str, Any]:
    client = {"enabled": True, "noise_multiplier": 1.5, "clip_norm": 0.5, "mechanism": "banded"}
    privacy = {"client": client | changes.pop("client", {}), **changes.pop("privacy", {})}
    return {"strategy": {"weighted": False}, "privacy": privacy, "selection": {"fraction": fraction}, **changes}


def vector(made: Any) -> torch.Tensor:
    tensors = made.strategy.server.adapter.tensors
    return torch.cat([tensors["q.factor_a"].flatten(), tensors["q.factor_b"].flatten()]).double()


def turn(number: int, groups: int, names: list[str] = NAMES) -> list[str]:
    return [one for one in names if group_of(one, groups=groups, seed=0) == (number - 1) % groups]


def useless(message: Any, task: Any) -> Message:
    return Message(RecordDict(), reply_to=message)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is drawn from the operating system, in order: one tensor after the other, round by round."""
    import os

    kept: list[torch.Tensor] = []

    class Captured(NoiseSource):
        def normal(self, count: int) -> torch.Tensor:
            kept.append(super().normal(count))
            return kept[-1]

    monkeypatch.setattr(
        "federated.aggregation.private_mean.noise_source", lambda seed=-1: Captured(os.urandom, private=True)
    )
    return kept


def correlated(fresh: list[torch.Tensor], groups: int, noise: float = 1.5 * 0.5) -> torch.Tensor:
    """L^-1 times the fresh noise, [rounds, values], by dense matrices."""
    rows = torch.cat(fresh).double().reshape(-1, SIZE)
    column = inverse_column(groups, len(rows))
    inverse = sum(np.eye(len(rows), k=-lag) * one for lag, one in enumerate(column))
    return torch.from_numpy(inverse) @ rows * noise * column_norm(groups)


def clipped(honest_delta: Make, names: list[str], bound: float = 0.5) -> torch.Tensor:
    total = torch.zeros(SIZE, dtype=torch.float64)
    for name in names:
        delta = honest_delta(name)
        flat = torch.cat([delta["q.factor_a"].flatten(), delta["q.factor_b"].flatten()]).double()
        total += flat * min(1.0, bound / float(flat.norm()))
    return total


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_groups_take_turns_and_noise_goes_on_from_round_to_round(
    federation: Make, fresh: list[torch.Tensor], honest_delta: Make, groups: int
):
    rounds = 2 * groups + 1
    made = federation(**banded(1 / groups, rounds=rounds))
    made.run(clients=8)
    cohorts = [event["cohort"] for event in made.events("round_start")]
    assert cohorts == [turn(number, groups) for number in range(1, rounds + 1)]
    total = sum(clipped(honest_delta, cohort) for cohort in cohorts) + correlated(fresh, groups).sum(dim=0)
    torch.testing.assert_close(vector(made), START + total / (8 / groups), rtol=1e-5, atol=1e-5)
    assert [event["rule"]["noise_row"] for event in made.events("round")] == list(range(1, rounds + 1))


def test_one_group_is_the_gaussian_mechanism_without_sampling_bit_for_bit(federation: Make):
    settings: dict[str, Any] = {"rounds": 3, "privacy": {"test_seed": 5}}
    made = {name: federation(**banded(1.0, client={"mechanism": name}, **settings)) for name in ("banded", "gaussian")}
    for one in made.values():
        one.run(clients=4)
    assert torch.equal(vector(made["banded"]), vector(made["gaussian"]))
    for name in ("round_start", "round"):
        one, other = (
            [{**event, "seconds": 0, "version_id": "", "parent": ""} for event in made[which].events(name)]
            for which in made
        )
        assert one == other


def test_epsilon_is_that_of_the_group_that_was_asked_most(federation: Make):
    made = federation(**banded(1 / 3, rounds=7))
    made.run(clients=8)
    spent = [event["privacy"]["accounts"][0] for event in made.events("round")]
    expected = [epsilon([GaussianSteps(1.5, 1.0, times)], 1e-5) for times in (1, 1, 1, 2, 2, 2, 3)]
    assert [account["epsilon"] for account in spent] == pytest.approx(expected)
    assert {account["sampling"] for account in spent} == {
        "none: each client at most once in 3 rounds, by a fixed division"
    }


def test_who_is_missing_leaves_noise_and_divisor_as_planned(
    federation: Make, fresh: list[torch.Tensor], honest_delta: Make
):
    first = turn(1, 2)
    made = federation(**banded(rounds=2))
    made.run(clients=8, script={first[0]: useless})
    came = [*first[1:], *turn(2, 2)]
    total = clipped(honest_delta, came) + correlated(fresh, 2).sum(dim=0)
    torch.testing.assert_close(vector(made), START + total / 4, rtol=1e-5, atol=1e-5)
    assert made.events("round")[0]["participants"] == len(first) - 1


def test_a_group_that_is_not_there_is_a_round_of_noise_alone(
    federation: Make, fresh: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, honest_delta: Make
):
    from federated.privacy.fixed_groups import FixedGroups

    real = FixedGroups.of_round
    monkeypatch.setattr(
        FixedGroups, "of_round", lambda self, number: ("gone", "away") if number == 2 else real(self, number)
    )
    made = federation(**banded(rounds=3))
    made.run(clients=8)
    assert [event["published"] for event in made.events("round")] == [True, True, True]
    total = 2 * clipped(honest_delta, turn(1, 2)) + correlated(fresh, 2).sum(dim=0)
    torch.testing.assert_close(vector(made), START + total / 4, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_server_optimizers_act_on_the_noised_mean(federation: Make, optimizer: str):
    changes = banded(rounds=3)
    changes["strategy"]["server_optimizer"] = {"name": optimizer, "learning_rate": 0.01}
    made = federation(**changes)
    made.run(clients=8)
    assert [event["published"] for event in made.events("round")] == [True] * 3


def test_a_quorum_that_fails_is_charged_and_the_noise_starts_anew(federation: Make, honest: Make):
    second = turn(2, 2)

    def late(message: Any, task: Any) -> Message:
        return useless(message, task) if task.round_number == 2 else honest(message, task)

    made = federation(**banded(rounds=4, round={"quorum": 0.9}))
    made.run(clients=8, script={second[0]: late})
    events = made.events("round")
    assert [event["published"] for event in events] == [True, False, True, True]
    assert [event["rule"].get("noise_row") for event in events] == [1, None, 1, 2]
    spent = events[-1]["privacy"]["accounts"][0]["epsilon"]
    assert spent == pytest.approx(epsilon([GaussianSteps(1.5, 1.0, 2)], 1e-5))


def test_a_result_that_is_not_applied_is_charged_and_the_noise_starts_anew(
    federation: Make, monkeypatch: pytest.MonkeyPatch
):
    from federated.flower.server_state import ServerState

    real = ServerState.apply

    def beyond(self: ServerState, result: Any) -> float:
        if self.finished == 2:
            raise AggregationError("the round would take the adapter beyond F32")
        return real(self, result)

    monkeypatch.setattr(ServerState, "apply", beyond)
    made = federation(**banded(rounds=5))
    made.run(clients=8)
    assert [event["rule"].get("noise_row") for event in made.events("round")] == [1, 2, None, 1, 2]


def test_a_budget_stop_is_one_of_the_group_s(federation: Make):
    twice = epsilon([GaussianSteps(1.5, 1.0, 2)], 1e-5)
    made = federation(**banded(rounds=9, privacy={"target_epsilon": twice + 0.01}))
    made.run(clients=8)
    assert [event["round_number"] for event in made.events("round")] == [1, 2, 3, 4]
    assert made.strategy.stopped.startswith("budget spent before round 5 of 9: 2 rounds of group 1 took epsilon")


def test_too_few_clients_are_refused_before_anybody_is_asked(federation: Make):
    made = federation(**banded(0.1))
    with pytest.raises(PrivacyError, match="3 clients in 10 groups"):
        made.run(clients=3)
    assert made.events("round_start") == []


# ---- resumed ---------------------------------------------------------------------------------------------------------


class Noted(RegistryPublisher):
    """A publisher that keeps what a registry would."""

    def __init__(self, config: Any) -> None:
        super().__init__(None, config, run_id="run", base_digest="b" * 64, method="fedit")
        self.saved: list[bytes] = []
        self.manifests: list[VersionManifest] = []

    def publish(self, training: TrainingState, **details: Any) -> VersionManifest:
        self.saved.append(training.to_bytes())
        self.manifests.append(super().publish(training, **details))
        return self.manifests[-1]


class Process:
    """A run in a folder, as one process after the other serves it."""

    def __init__(self, federation: Make, folder: Path, **changes: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.federation, self.folder, self.changes = federation, folder, changes
        self.publisher = Noted(federation(**changes).strategy.config)

    def start(self, rounds: int, *, script: Any = None, clients: int = 8, version: int = -1) -> Any:
        """Go on from the newest version (or an older one) up to this round, in a strategy of its own."""
        plain = self.federation(**self.changes).strategy
        resume = None
        if self.publisher.saved:
            saved = TrainingState.from_bytes(self.publisher.saved[version])
            resume = (saved, self.publisher.manifests[version].version_id)
        privacy = ServerPrivacy.of_run(
            plain.config,
            plain.rule,
            folder=self.folder,
            run_id="run",
            saved_head=resume[0].ledger_head if resume else None,
        )
        made = self.federation({"publisher": self.publisher, "resume": resume, "privacy": privacy}, **self.changes)
        try:
            made.run(clients=clients, script=script, num_rounds=rounds)
        finally:
            made.strategy.close()
        return made

    def rows(self, made: Any) -> list[float | None]:
        return [event["rule"].get("noise_row") for event in made.events("round")]


@pytest.fixture
def process(federation: Make, tmp_path: Path) -> Callable[..., Process]:
    return lambda name, **changes: Process(
        federation, tmp_path / name, **banded(1 / 3, rounds=9, privacy={"test_seed": 11}, **changes)
    )


def test_a_run_that_is_resumed_is_the_run_that_was_never_stopped(process: Make):
    straight = process("straight").start(7)
    parts = process("parts")
    for rounds in (1, 2, 5):
        parts.start(rounds)
    resumed = parts.start(7)
    assert torch.equal(vector(resumed), vector(straight))
    assert parts.rows(resumed) == [6.0, 7.0]


def test_without_the_noise_that_was_kept_it_would_be_another_run(process: Make, caplog: pytest.LogCaptureFixture):
    straight = process("straight").start(7)
    parts = process("parts")
    parts.start(5)
    (parts.folder / "noise.history").unlink()
    resumed = parts.start(7)
    assert not torch.equal(vector(resumed), vector(straight))
    assert parts.rows(resumed) == [1.0, 2.0]
    assert "round 6: the noise starts anew: no noise of the rounds before is kept" in caplog.text


def test_a_killed_round_is_charged_again_to_its_group_and_the_noise_starts_anew(process: Make, honest: Make):
    def killed(message: Any, task: Any) -> Message:
        if task.round_number == 4:
            raise KeyboardInterrupt
        return honest(message, task)

    run = process("run")
    with pytest.raises(RunInterrupted):
        run.start(6, script=dict.fromkeys(NAMES, killed))
    assert len(run.publisher.manifests) == 4
    resumed = run.start(6)
    assert run.rows(resumed) == [1.0, 2.0, 3.0]
    again = turn(4, 3)
    assert resumed.events("round_start")[0]["cohort"] == again
    ledger = (run.folder / "privacy_ledger.jsonl").read_text()
    assert [ledger.count(f"group {number} of 3") for number in (1, 2, 3)] == [3, 2, 2]
    spent = resumed.events("round")[-1]["privacy"]["accounts"][0]["epsilon"]
    assert spent == pytest.approx(epsilon([GaussianSteps(1.5, 1.0, 3)], 1e-5))


def test_an_older_version_is_gone_on_from_with_noise_of_its_own(process: Make):
    """An older registry was put back: its later versions were seen, and the ledger knows of them."""
    run = process("run")
    run.start(5)
    resumed = run.start(6, version=3)
    assert run.rows(resumed) == [1.0, 2.0, 3.0]
    ledger = (run.folder / "privacy_ledger.jsonl").read_text()
    assert [ledger.count(f"group {number} of 3") for number in (1, 2, 3)] == [3, 3, 2]


def test_a_version_that_was_published_just_before_a_crash_is_not_gone_on_from_twice(
    process: Make, monkeypatch: pytest.MonkeyPatch
):
    run = process("run")
    run.start(2)
    with monkeypatch.context() as patch:
        patch.setattr(ServerPrivacy, "published", lambda self, number: None)  # killed between the two writes
        run.start(3)
    resumed = run.start(5)
    assert [event["round_number"] for event in resumed.events("round")] == [4, 5]
    assert run.rows(resumed) == [1.0, 2.0]


def test_a_client_that_comes_later_takes_no_part(process: Make):
    run = process("run")
    run.start(1, clients=5)
    later = run.start(4, clients=8)
    asked = {one for event in later.events("round_start") for one in event["cohort"]}
    assert asked <= set(NAMES[:5])
    assert run.publisher.manifests[-1].participants == 2  # 5 clients in 3 groups


def test_a_resumed_run_needs_its_groups(process: Make):
    run = process("run")
    run.start(2)
    (run.folder / "groups.json").unlink()
    with pytest.raises(PrivacyError, match="put it back"):
        run.start(3)


def test_another_fraction_is_another_division(process: Make):
    run = process("run")
    run.start(2)
    run.changes["selection"] = {"fraction": 0.5}
    with pytest.raises(PrivacyError, match="3 groups by seed 0"):
        run.start(3)


def test_more_rounds_than_were_planned_go_on_with_a_longer_band_and_noise_of_its_own(process: Make):
    run = process("run")
    run.changes["rounds"] = 2
    run.start(2)
    run.changes["rounds"] = 6
    resumed = run.start(6)
    assert run.rows(resumed) == [1.0, 2.0, 3.0, 4.0]


def test_noise_is_in_no_message_no_version_and_no_event(process: Make, honest: Make):
    sent: list[bytes] = []

    def seen(message: Any, task: Any) -> Message:
        sent.extend((repr(message.content).encode(), packet_of(message.content)))
        return honest(message, task)

    run = process("run")
    made = run.start(4, script=dict.fromkeys(NAMES, seen))
    history = made.strategy._privacy._noise._history
    adapter = torch.full((2, 3), 0.25).numpy().tobytes()
    assert any(adapter in data for data in sent)  # else the search would find nothing anywhere
    rows = [row for tensor in history.tensors.values() for row in tensor]
    assert len(rows) == 4
    noise = [row.numpy().tobytes() for row in rows]
    kept = [*sent, *run.publisher.saved, *(repr(one.to_dict()).encode() for one in run.publisher.manifests)]
    kept += [repr(made.tracker.events).encode()]
    (file,) = (one for one in run.folder.iterdir() if one.name == "noise.history")
    assert all(one in file.read_bytes() for one in noise)
    assert not any(one in data for one in noise for data in kept)
    assert "noise" not in repr(TrainingState.from_bytes(run.publisher.saved[-1]).global_state.rule_state)
