"""Rules that change what a factor is: whole rounds, and what a device then serves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from federated.adapters import shell
from federated.aggregation import RULES, make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy, InProcessGrid, Session, handle_query, handle_train, open_session
from federated.flower.baselines import evaluate_everywhere, full_session, train_on
from federated.state import group_of
from federated.testing import effective_of
from federated.tracking import MemoryTracker

SHARED = [name for name in sorted(RULES) if not make_rule(name).properties.personal]


def experiment(config: ExperimentConfig, name: str, **adapter: Any) -> ExperimentConfig:
    properties = make_rule(name).properties
    partition = replace(config.data.partition, num_clients=max(3, properties.min_updates))
    return replace(
        config,
        rounds=2,
        strategy=replace(config.strategy, rule=name, weighted=not properties.robust),
        adapter=replace(config.adapter, kind=properties.adapter, **adapter),
        data=replace(config.data, partition=partition),
        train=replace(config.train, optimizer="sgd" if properties.plain_sgd else "adamw", learning_rate=0.05, steps=2),
    )


def run(config: ExperimentConfig, session: Session) -> tuple[DeltaStrategy, MemoryTracker]:
    app, tracker = ClientApp(), MemoryTracker(clock=lambda: 0.0)
    app.query()(handle_query)
    app.train()(handle_train)
    base = session.adapter.base.base_digest
    strategy = DeltaStrategy(config, initial=session.initial, base_digest=base, tracker=tracker, run_id="run")
    with InProcessGrid(app, len(session.source.client_ids)) as grid:
        strategy.start(grid)
    return strategy, tracker


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("name", SHARED)
def test_a_device_serves_what_the_clients_measured(
    real_config: ExperimentConfig, name: str, dtype: str, bound: float
) -> None:
    config = experiment(real_config, name, dtype=dtype)
    session = open_session(config)
    strategy, tracker = run(config, session)
    exported = strategy.server.global_state.export()
    state = strategy.server.global_state
    held, found = effective_of(replace(state.adapter, residual=state.residual)), effective_of(exported)
    size = float(torch.stack([matrix.norm() for matrix in held.values()]).norm())
    assert size > 0
    assert all(float((found[layer] - matrix).norm()) <= bound * size for layer, matrix in held.items())
    assert exported.spec.peft_type == "lora"
    device = shell(session.adapter.base, exported.spec)
    device.write(exported)
    on_device = replace(session, trainer=type(session.trainer)(device, session.task, session.config.train))
    pooled, _ = evaluate_everywhere(on_device, exported)
    assert pooled["loss"] == pytest.approx(tracker.of("final")[0]["evaluation"]["loss"], abs=bound * 10)


@pytest.mark.parametrize("init", ["svd", "random"])
def test_only_the_core_and_the_head_move(real_config: ExperimentConfig, init: str) -> None:
    config = experiment(real_config, "fedsb", core_init=init)
    session = open_session(config)
    strategy, tracker = run(config, session)
    for name, tensor in strategy.server.adapter.tensors.items():
        assert torch.equal(tensor, session.initial.tensors[name]) == (group_of(name) in ("factor_a", "factor_b")), name
    losses = [event["evaluation"]["loss"] for event in (*tracker.of("round"), *tracker.of("final"))]
    assert losses[-1] < losses[0]


def test_server_optimizers_compose_with_cores(real_config: ExperimentConfig) -> None:
    config = experiment(real_config, "fedsb")
    optimizer = replace(config.strategy.server_optimizer, name="adam", learning_rate=0.01)
    config = replace(config, strategy=replace(config.strategy, server_optimizer=optimizer))
    session = open_session(config)
    strategy, _ = run(config, session)
    cores = {name: tensor for name, tensor in strategy.server.adapter.tensors.items() if group_of(name) == "core"}
    assert cores
    assert all(tensor.any() for tensor in cores.values())


def test_central_training_of_a_cored_adapter_trains_its_core(real_config: ExperimentConfig) -> None:
    session = full_session(experiment(real_config, "fedsb"))
    trained, _ = train_on(session, session.source.client_ids, name="central", threads=1)
    moved = {
        group_of(n) for n, tensor in trained.tensors.items() if not torch.equal(tensor, session.initial.tensors[n])
    }
    assert moved == {"core", "dense"}
