"""Adapters without factors in whole rounds: real clients, changing cohorts, the float64 mean, resume, a device."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from federated.adapters import shell
from federated.aggregation import FedIT
from federated.config import AdapterConfig, ExperimentConfig, ModelConfig, ServerOptimizerConfig, TaskConfig
from federated.delta import Update
from federated.errors import ConfigError, FederatedError
from federated.flower import (
    DeltaStrategy,
    InProcessGrid,
    Session,
    TrainingState,
    handle_query,
    handle_train,
    open_session,
)
from federated.flower.client_site import ClientSite
from federated.global_state import GlobalState
from federated.tracking import MemoryTracker

KINDS = ("ia3", "layernorm", "head", "full", "prompt", "prefix")
LANGUAGE = ModelConfig(source="tiny:llama"), TaskConfig(name="causal_lm", max_length=24)
RATES = {"ia3": 0.05, "layernorm": 0.05, "head": 0.05, "full": 0.01, "prompt": 0.2, "prefix": 0.2}
CASES = [*((kind, False) for kind in KINDS), ("ia3", True), ("prompt", True), ("prefix", True)]
every_case = pytest.mark.parametrize(
    ("kind", "language"), CASES, ids=[f"{kind}{'-causal_lm' * language}" for kind, language in CASES]
)


class Recorded(FedIT):
    """FedIT that writes down what each round started from and was given."""

    def __init__(self) -> None:
        self.rounds: list[tuple[Mapping[str, torch.Tensor], list[tuple[Update, float]]]] = []

    def start(self, state: GlobalState, phase: int) -> Any:
        mean, given = super().start(state, phase), []
        self.rounds.append((state.adapter.tensors, given))
        add = mean.add

        def noted(update: Update, weight: float) -> None:
            given.append((update, weight))
            add(update, weight)

        mean.add = noted  # type: ignore[method-assign]
        return mean


def client_app() -> ClientApp:
    app = ClientApp()
    app.query()(handle_query)
    app.train()(handle_train)
    return app


def run(config: ExperimentConfig, session: Session, **parts: Any) -> tuple[DeltaStrategy, MemoryTracker]:
    tracker = MemoryTracker(clock=lambda: 0.0)
    base = session.adapter.base.base_digest
    given = {"initial": session.initial, "base_digest": base, "tracker": tracker, "run_id": "run", **parts}
    strategy = DeltaStrategy(config, **given)
    with InProcessGrid(client_app(), 3) as grid:
        strategy.start(grid)
    return strategy, tracker


@pytest.fixture
def three_rounds(real_config: ExperimentConfig, kind: str, language: bool) -> ExperimentConfig:
    """Two of three clients a round."""
    model, task = LANGUAGE if language else (real_config.model, real_config.task)
    return replace(
        real_config,
        model=model,
        task=task,
        rounds=3,
        adapter=AdapterConfig(kind=kind),  # type: ignore[arg-type]
        selection=replace(real_config.selection, fraction=0.6),
        train=replace(real_config.train, learning_rate=RATES[kind], steps=2),
    )


@every_case
def test_the_next_round_starts_from_the_float64_mean(three_rounds: ExperimentConfig, kind: str) -> None:
    session, rule = open_session(three_rounds), Recorded()
    strategy, tracker = run(three_rounds, session, rule=rule)
    assert len({tuple(event["cohort"]) for event in tracker.of("round_start")}) > 1
    assert all(event["status"] == "ok" for event in tracker.of("client"))
    starts = [before for before, _ in rule.rounds[1:]] + [strategy.server.adapter.tensors]
    for (before, given), made in zip(rule.rounds, starts, strict=True):
        total = sum(weight for _, weight in given)
        assert len(given) == 2
        for name, value in made.items():
            mean = sum(weight * update.delta[name].double() for update, weight in given) / total
            torch.testing.assert_close(value, (before[name].double() + mean).float(), rtol=1e-7, atol=0)
        assert any(not torch.equal(made[name], before[name]) for name in made)


@every_case
def test_a_run_stopped_after_any_round_goes_on_as_if_it_was_not(three_rounds: ExperimentConfig, kind: str) -> None:
    optimizer = ServerOptimizerConfig("momentum", learning_rate=0.7)
    config = replace(three_rounds, strategy=replace(three_rounds.strategy, server_optimizer=optimizer))
    session = open_session(config)
    whole, _ = run(config, session)
    for stop in (1, 2):
        first, _ = run(replace(config, rounds=stop), session)
        saved = TrainingState.from_bytes(first.server.training_state(stop).to_bytes())
        assert saved.global_state.adapter.spec == session.initial.spec
        again, _ = run(config, session, resume=(saved, first.version_id))
        for tensor, value in whole.server.adapter.tensors.items():
            assert torch.equal(again.server.adapter.tensors[tensor], value)


@every_case
def test_arrivals_in_any_order_give_the_same_bits(three_rounds: ExperimentConfig, kind: str) -> None:
    config = replace(three_rounds, rounds=1, selection=replace(three_rounds.selection, fraction=1.0))
    session, found = open_session(config), []
    for seed in (0, 1, 2):
        strategy = DeltaStrategy(
            config, initial=session.initial, base_digest=session.adapter.base.base_digest, run_id="run"
        )
        with InProcessGrid(client_app(), 3, shuffle=seed) as grid:
            strategy.start(grid)
        found.append(strategy.server.adapter.tensors)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@every_case
def test_a_device_serves_what_was_exported(three_rounds: ExperimentConfig, kind: str) -> None:
    session = open_session(three_rounds)
    strategy, _ = run(three_rounds, session)
    exported = strategy.server.global_state.export()
    slot = shell(session.adapter.base, exported.spec, seed=123)
    slot.write(exported)
    test = session.local_data("client-000").test
    served = session.task.evaluate(slot.model, test, batch_size=4)
    assert served == session.trainer.evaluate(exported, test)
    assert served != session.trainer.evaluate(session.initial, test)


def test_a_client_trains_no_larger_model_whole_than_its_owner_allows(real_config: ExperimentConfig) -> None:
    asked = replace(real_config, adapter=AdapterConfig(kind="full", max_params=10**8))
    site = ClientSite("a", "store", data=real_config.data, model=real_config.model, max_params=1000)
    with pytest.raises(FederatedError, match=r"adapter\.max_params = 1,000"):
        open_session(site.applied_to(asked))
    generous = replace(site, max_params=10**9)
    assert generous.applied_to(asked).adapter.max_params == 10**8
    assert ClientSite("a", "store").applied_to(asked) is asked


def test_a_rule_for_factors_is_refused_before_anything_starts(real_config: ExperimentConfig) -> None:
    config = replace(
        real_config, adapter=AdapterConfig(kind="ia3"), strategy=replace(real_config.strategy, rule="rolora")
    )
    session = open_session(config)
    with pytest.raises(ConfigError, match="rolora works on LoRA's factors"):
        DeltaStrategy(config, initial=session.initial, base_digest="b" * 64, run_id="run")
