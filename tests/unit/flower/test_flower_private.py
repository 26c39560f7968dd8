"""Client-level privacy on the in-process Grid with fake clients: clipped, noised, charged, recorded, stopped."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import RecordDict

from federated.aggregation import make_rule
from federated.aggregation.combine_privacy import check_client_privacy
from federated.errors import ConfigError, PrivacyError
from federated.flower.server_privacy import ServerPrivacy
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.chance import NoiseSource

Make = Callable[..., Any]
SIZE = 2 * 3 + 2 * 2


class Captured(NoiseSource):
    """Noise of a fixed kind, kept as it was drawn."""

    drawn: ClassVar[list[torch.Tensor]] = []

    def normal(self, count: int) -> torch.Tensor:
        values = super().normal(count)
        Captured.drawn.append(values)
        return values


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the mechanism draws, in order."""
    import os

    Captured.drawn = []
    monkeypatch.setattr(
        "federated.aggregation.private_mean.noise_source", lambda seed=-1: Captured(os.urandom, private=True)
    )
    return Captured.drawn


def private(client: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    strategy = {"weighted": False, **changes.pop("strategy", {})}
    privacy = {"client": {"enabled": True, "noise_multiplier": 1.0, **(client or {})}, **changes.pop("privacy", {})}
    return {"strategy": strategy, "privacy": privacy, **changes}


def clipped_sum(deltas: list[dict[str, torch.Tensor]], bound: float) -> torch.Tensor:
    """The dense truth: all tensors of an update in one float64 vector."""
    flat = [torch.cat([delta["q.factor_a"].flatten(), delta["q.factor_b"].flatten()]).double() for delta in deltas]
    return sum((one * min(1.0, bound / one.norm()) for one in flat), torch.zeros(SIZE, dtype=torch.float64))


def vector(made: Any) -> torch.Tensor:
    tensors = made.strategy.server.adapter.tensors
    return torch.cat([tensors["q.factor_a"].flatten(), tensors["q.factor_b"].flatten()]).double()


START = torch.tensor([0.25] * 6 + [-0.25] * 4, dtype=torch.float64)


def test_a_round_is_the_clipped_sum_and_noise_over_the_planned_cohort(federation: Make, noise: Any, honest_delta: Make):
    made = federation(**private({"clip_norm": 0.5, "noise_multiplier": 2.0}, rounds=1))
    made.run()
    truth = clipped_sum([honest_delta(f"client-{number:03d}") for number in range(3)], 0.5)
    drawn = torch.cat(noise).double()
    torch.testing.assert_close(vector(made), START + (truth + 2.0 * 0.5 * drawn) / 3, rtol=1e-6, atol=1e-6)


def test_who_is_missing_leaves_noise_and_divisor_as_planned(federation: Make, noise: Any, honest_delta: Make):
    def useless(message: Any, task: Any) -> Any:
        from flwr.app import Message

        return Message(RecordDict(), reply_to=message)

    made = federation(**private(rounds=1))
    made.run(script={"client-001": useless})
    truth = clipped_sum([honest_delta("client-000"), honest_delta("client-002")], 1.0)
    torch.testing.assert_close(vector(made), START + (truth + torch.cat(noise).double()) / 3, rtol=1e-6, atol=1e-6)
    assert made.events("round")[0]["participants"] == 2


def test_a_quorum_that_fails_releases_nothing_and_is_charged(federation: Make):
    def useless(message: Any, task: Any) -> Any:
        from flwr.app import Message

        return Message(RecordDict(), reply_to=message)

    made = federation(**private(rounds=1, round={"quorum": 0.9}))
    made.run(script={"client-001": useless})
    (event,) = made.events("round")
    assert not event["published"]
    assert event["privacy"]["accounts"][0]["epsilon"] == pytest.approx(epsilon([GaussianSteps(1.0, 1.0, 1)], 1e-5))
    assert torch.equal(vector(made), START)


def test_zero_and_huge_updates_are_bounded_alike(federation: Make, noise: Any, honest: Make):
    def zero(message: Any, task: Any) -> Any:
        return honest(message, task, delta={"q.factor_a": torch.zeros(2, 3), "q.factor_b": torch.zeros(2, 2)})

    def huge(message: Any, task: Any) -> Any:
        return honest(
            message, task, delta={"q.factor_b": torch.full((2, 2), 1e30), "q.factor_a": torch.full((2, 3), -1e30)}
        )

    made = federation(**private(rounds=1))
    made.run(clients=2, script={"client-000": zero, "client-001": huge})
    truth = torch.tensor([-1.0] * 6 + [1.0] * 4, dtype=torch.float64) / SIZE**0.5
    torch.testing.assert_close(vector(made), START + (truth + torch.cat(noise).double()) / 2, rtol=1e-6, atol=1e-6)


def test_no_config_seed_touches_the_noise(federation: Make):
    runs = [federation(**private(rounds=1, seed=7)) for _ in range(2)]
    for one in runs:
        one.run()
    assert not torch.equal(vector(runs[0]), vector(runs[1]))


def test_a_test_seed_repeats_the_run_with_other_noise_each_round_and_stamps_it(federation: Make, monkeypatch: Any):
    seeds: list[int] = []
    from federated.aggregation import private_mean
    from federated.privacy.chance import noise_source

    monkeypatch.setattr(private_mean, "noise_source", lambda seed=-1: seeds.append(seed) or noise_source(seed))
    runs = [federation(**private(rounds=2, privacy={"test_seed": 3})) for _ in range(2)]
    for one in runs:
        one.run()
    assert torch.equal(vector(runs[0]), vector(runs[1]))
    assert len(set(seeds)) == 2
    assert runs[0].events("round")[0]["privacy"]["accounts"][0]["private"] is False


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_server_optimizers_act_on_the_noised_mean(federation: Make, optimizer: str):
    chosen = {"name": optimizer, "learning_rate": 0.01}
    made = federation(**private(rounds=2, strategy={"server_optimizer": chosen}))
    made.run()
    assert [event["published"] for event in made.events("round")] == [True, True]


def test_epsilon_stands_beside_each_version_and_its_metrics_do_not(federation: Make):
    from federated.flower.publisher import RegistryPublisher

    published: list[Any] = []

    class Noted(RegistryPublisher):
        def publish(self, training: Any, **details: Any) -> Any:
            published.append(super().publish(training, **details))
            return published[-1]

    made = federation(**private(rounds=2))
    publisher = Noted(None, made.strategy.config, run_id="run", base_digest="b" * 64, method="fedit")
    made = federation({"publisher": publisher}, **private(rounds=2))
    made.run()
    spent = [manifest.privacy["accounts"][0] for manifest in published]
    expected = [0.0, *(epsilon([GaussianSteps(1.0, 1.0, rounds)], 1e-5) for rounds in (1, 2))]
    assert [account["epsilon"] for account in spent] == pytest.approx(expected)
    assert {account["unit"] for account in spent} == {"client"}
    assert [dict(manifest.metrics) for manifest in published] == [{}, {}, {}]
    assert [manifest.participants for manifest in published] == [0, 3, 3]
    assert [event["privacy"]["accounts"][0]["epsilon"] for event in made.events("round")] == pytest.approx(expected[1:])


def test_the_run_stops_with_what_it_has_when_the_budget_is_spent(federation: Make):
    target = epsilon([GaussianSteps(1.0, 1.0, 2)], 1e-5)
    made = federation(**private(rounds=5, privacy={"target_epsilon": target + 0.1}))
    made.run()
    assert [event["round_number"] for event in made.events("round")] == [1, 2]
    assert made.strategy.stopped.startswith("budget spent before round 3 of 5")
    assert made.events("warning")[0]["message"] == made.strategy.stopped
    assert len(made.events("final")) == 1


def test_noise_is_solved_for_all_rounds(federation: Make):
    made = federation(**private({"noise_multiplier": 0.0}, rounds=4, privacy={"target_epsilon": 8.0}))
    made.run()
    assert len(made.events("round")) == 4
    assert 7.9 < made.events("round")[-1]["privacy"]["accounts"][0]["epsilon"] <= 8.0


def test_a_round_that_cannot_fit_is_refused_before_anything_starts(federation: Make):
    with pytest.raises(PrivacyError, match="one round alone costs epsilon"):
        federation(**private({"noise_multiplier": 0.5}, privacy={"target_epsilon": 1.0}))


def test_adaptive_clipping_follows_the_quantile_and_is_saved(federation: Make):
    client = {"clipping": "adaptive", "quantile_noise": 2.0, "clip_norm": 100.0, "quantile_rate": 1.0}
    made = federation(**private(client, rounds=3))
    made.run()
    norms = [event["rule"]["clip_norm"] for event in made.events("round")]
    shares = [event["rule"]["unclipped_share"] for event in made.events("round")]
    assert norms[0] == 100.0
    for before, after, share in zip(norms, norms[1:], shares, strict=False):
        assert after == pytest.approx(before * 2.718281828459045 ** -(share - 0.5))
    from federated.flower.publisher import TrainingState

    state = made.strategy.server.training_state(3)
    saved = TrainingState.from_bytes(state.to_bytes()).global_state.rule_state.scalars["privacy.clip_norm"]
    assert saved == pytest.approx(norms[-1] * 2.718281828459045 ** -(shares[-1] - 0.5))
    resumed = federation({"resume": (replace(state), "v" * 64)}, **private(client, rounds=4))
    resumed.run()
    assert resumed.events("round")[0]["rule"]["clip_norm"] == saved


def test_poisson_cohorts_come_from_a_key_that_is_nowhere_else(federation: Make, tmp_path: Path):
    from federated.flower.server_privacy import ServerPrivacy

    config = federation(**private({"sampling": "poisson"}, rounds=12, selection={"fraction": 0.3})).strategy.config
    made = federation(**private({"sampling": "poisson"}, rounds=12, selection={"fraction": 0.3}))
    held = ServerPrivacy(config, made.strategy.rule, folder=tmp_path)
    made = federation({"privacy": held}, **private({"sampling": "poisson"}, rounds=12, selection={"fraction": 0.3}))
    made.run(clients=6)
    cohorts = [event["cohort"] for event in made.events("round_start")]
    assert len({len(cohort) for cohort in cohorts}) > 1
    key = (tmp_path / "cohorts.key").read_text()
    secret = key.split('"key": "')[1][:64]
    assert secret not in str(made.tracker.events)
    assert secret not in config.to_json()
    assert oct((tmp_path / "cohorts.key").stat().st_mode & 0o777) == "0o600"
    account = made.events("round")[-1]["privacy"]["accounts"][0]
    assert account["epsilon"] == pytest.approx(epsilon([GaussianSteps(1.0, 0.3, 12)], 1e-5))


def test_a_round_that_is_done_again_draws_anew_and_says_that_it_is_charged_again(federation: Make, tmp_path: Path):
    """The server died after it had charged and asked: the ledger counts both, and the record says so."""
    changes = private({"sampling": "poisson"}, rounds=1, selection={"fraction": 0.5, "min_clients": 12})
    config = federation(**changes).strategy.config
    rule = make_rule(config.strategy.rule)
    before = ServerPrivacy.of_run(config, rule, folder=tmp_path, run_id="run")
    assert before is not None
    names = [f"client-{number:03d}" for number in range(12)]
    before.plan(names)
    assert before.charge(1) == ""
    first = before.draw(names, 1)
    before.close()  # what a kill does
    resumed = federation({"privacy": ServerPrivacy.of_run(config, rule, folder=tmp_path, run_id="run")}, **changes)
    resumed.run(clients=12)
    (said,) = resumed.events("warning")
    assert "round 1 was charged before and published nothing" in said["message"]
    assert "(2 times now)" in said["message"]
    assert len(resumed.strategy._privacy.budget.events) == 2
    assert tuple(resumed.events("round_start")[0]["cohort"]) != first
    resumed.strategy.close()


def test_an_empty_cohort_is_a_round_of_noise_alone(federation: Make, monkeypatch: Any, noise: Any):
    from federated.privacy.cohorts import PoissonCohorts

    monkeypatch.setattr(PoissonCohorts, "draw", lambda self, fraction: ())
    made = federation(**private({"sampling": "poisson"}, rounds=1, selection={"fraction": 0.5}))
    made.run(clients=4)
    assert made.events("round")[0]["published"]
    torch.testing.assert_close(vector(made), START + torch.cat(noise).double() / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": {"weighted": True}}, "strategy.weighted = true"),
        ({"round": {"mode": "buffered"}}, "round.mode = 'buffered'"),
        ({"selection": {"policy": "availability"}}, "selection.policy"),
        ({"client": {"mechanism": "banded", "sampling": "poisson"}}, "nothing is drawn by chance"),
        ({"client": {"mechanism": "banded", "clipping": "adaptive"}}, "may not follow the clipping norm"),
        ({"client": {"mechanism": "banded"}, "strategy": {"rule": "rolora"}}, "rolora asks for other tensors"),
        ({"client": {"mechanism": "banded"}, "strategy": {"rule": "fedsvd"}}, "fedsvd makes a new basis"),
        ({"client": {"mechanism": "banded"}, "strategy": {"rule": "fednova"}}, "one by one"),
        ({"client": {"mechanism": "banded"}, "strategy": {"weighted": True}}, "strategy.weighted = true"),
        ({"client": {"mechanism": "banded"}, "selection": {"policy": "round_robin"}}, "banded has turns of its own"),
        ({"client": {"mechanism": "banded"}, "round": {"mode": "buffered"}}, "round.mode = 'buffered'"),
        ({"strategy": {"rule": "flora"}}, "residual"),
        ({"strategy": {"rule": "median"}}, "single updates"),
        ({"strategy": {"rule": "fedask"}}, "second message"),
        ({"strategy": {"rule": "flexlora"}}, "plain sum"),
        ({"strategy": {"rule": "feddyn"}}, "one by one"),
        ({"strategy": {"rule": "fednova"}}, "one by one"),
    ],
)
def test_what_noise_does_not_cover_is_refused_with_a_reason(federation: Make, changes: dict[str, Any], words: str):
    client = changes.pop("client", {})
    with pytest.raises(ConfigError, match=words):
        federation(**private(client, **changes))


def test_whoever_leaves_brings_nobody_in(config: Make) -> None:
    """Without sampling that is claimed a cohort is public, and each client is in it or not by its own name alone."""
    made = config(**private(selection={"fraction": 0.3}))
    clients = [f"client-{number:03d}" for number in range(50)]
    privacy = ServerPrivacy(made, make_rule("fedit", {}))
    privacy.plan(clients)
    assert privacy.planned == 15.0
    cohort = privacy.draw(clients, 1)
    without = privacy.draw([name for name in clients if name != cohort[0]], 1)
    assert without == cohort[1:]


def test_a_probability_that_gives_one_client_away_is_refused(config: Make, federation: Make) -> None:
    made = config(**private(privacy={"target_delta": 0.2}))
    rule = make_rule("fedit", {})
    with pytest.raises(PrivacyError, match=r"target_delta = 0\.2 is not below 1 / 5 clients"):
        ServerPrivacy(made, rule).plan([f"client-{number}" for number in range(5)])
    with pytest.raises(ConfigError, match=r"target_delta = 0\.2 is not below 1 / 5 clients"):
        check_client_privacy(rule, made, clients=5)
    check_client_privacy(rule, made, clients=4)
