"""HetLoRA, LoRA-FAIR, FlexLoRA with error feedback, in whole rounds: ranks, memory across a stop, a device's share."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from federated.adapters import shell
from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.errors import WireError
from federated.flower import (
    DeltaStrategy,
    InProcessGrid,
    Session,
    TrainingState,
    handle_query,
    handle_train,
    open_session,
)
from federated.flower.records import Assignment
from federated.manifest import TrainPlan, canonical_json
from federated.state import AdapterState
from federated.testing import effective_of
from federated.tracking import MemoryTracker
from federated.training import client_seed

PRUNING = {"prune_gamma": 0.5, "tail_penalty": 0.5}
COMPOSED = {
    "hetlora": ("hetlora", {}),
    "hetlora that prunes": ("hetlora", PRUNING),
    "lora_fair": ("lora_fair", {}),
    "lora_fair by ridge": ("lora_fair", {"objective": "ridge"}),
    "flexlora with feedback": ("flexlora", {"error_feedback": True}),
    "fedask": ("fedask", {}),
}
every = pytest.mark.parametrize("name", [name for name in COMPOSED if name != "lora_fair"])


@pytest.fixture
def rounds(real_config: ExperimentConfig, request: pytest.FixtureRequest) -> ExperimentConfig:
    """Three rounds of two of three clients; of three ranks where the rule takes them."""
    rule, options = COMPOSED[request.getfixturevalue("name")]
    mixed = make_rule(rule, options).properties.mixed_ranks
    return replace(
        real_config,
        rounds=3,
        adapter=replace(real_config.adapter, rank=4 if mixed else 2, client_ranks=(1, 2, 4) if mixed else ()),
        strategy=replace(real_config.strategy, rule=rule, options=options),
        selection=replace(real_config.selection, fraction=0.6),
        train=replace(real_config.train, learning_rate=0.05, steps=2),
    )


@pytest.fixture
def session(rounds: ExperimentConfig) -> Session:
    return open_session(rounds)


def run(config: ExperimentConfig, session: Session, **parts: Any) -> tuple[DeltaStrategy, MemoryTracker]:
    tracker = MemoryTracker(clock=lambda: 0.0)
    base_digest = session.adapter.base.base_digest
    strategy = DeltaStrategy(
        config, initial=session.initial, base_digest=base_digest, tracker=tracker, run_id="run", **parts
    )
    app = ClientApp()
    app.query()(handle_query)
    app.train()(handle_train)
    with InProcessGrid(app, 3) as grid:
        strategy.start(grid)
    return strategy, tracker


@every
def test_every_round_is_published_and_moves(rounds: ExperimentConfig, session: Session, name: str) -> None:
    strategy, tracker = run(rounds, session)
    assert [event["published"] for event in tracker.of("round")] == [True] * 3
    assert all(event["update_norm"] > 0 for event in tracker.of("round"))
    assert {event["status"] for event in tracker.of("client")} == {"ok"}
    assert all(torch.isfinite(tensor).all() for tensor in strategy.server.adapter.tensors.values())


@every
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(rounds: ExperimentConfig, session: Session, name: str) -> None:
    whole, _ = run(rounds, session)
    first, _ = run(replace(rounds, rounds=1), session)
    saved = TrainingState.from_bytes(first.server.training_state(1).to_bytes())
    again, _ = run(rounds, session, resume=(saved, first.version_id))
    assert all(torch.equal(again.server.adapter.tensors[n], t) for n, t in whole.server.adapter.tensors.items())
    memory, expected = again.server.global_state.rule_state, whole.server.global_state.rule_state
    assert memory.scalars == expected.scalars
    assert memory.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(memory.tensors[n], t) for n, t in expected.tensors.items())


@every
def test_a_device_serves_what_the_server_made(rounds: ExperimentConfig, session: Session, name: str) -> None:
    made = run(rounds, session)[0].server.global_state
    exported = made.export()
    served = shell(session.adapter.base, exported.spec)
    served.write(exported)
    for layer, matrix in effective_of(made.adapter).items():
        assert matrix.any()
        torch.testing.assert_close(effective_of(served.read())[layer], matrix, rtol=1e-5, atol=1e-7)


class TestHetLoRA:
    name = pytest.mark.parametrize("name", ["hetlora that prunes"])

    @name
    def test_ranks_fall_and_are_sent_so(self, rounds: ExperimentConfig, session: Session, name: str):
        strategy, tracker = run(replace(rounds, rounds=6), session)
        pruned = sum(event["rule"]["pruned"] for event in tracker.of("round"))
        ranks = strategy.server.global_state.rule_state.scalars["ranks"]
        assert pruned >= len(ranks) > 0
        assert set(ranks) <= {"client-001", "client-002"}  # the first trains at rank one, which has no tail
        assert all(rank in (1, 2) for rank in ranks.values())
        events = [event for event in tracker.of("client") if event["client_id"] in ranks]
        for client in ranks:
            sizes = [event["bytes_down"] for event in events if event["client_id"] == client]
            assert sizes[-1] < sizes[0] or ranks[client] == 1

    @pytest.mark.parametrize("name", ["hetlora"])
    def test_a_smaller_rank_is_fewer_bytes(self, rounds: ExperimentConfig, session: Session, name: str):
        _, tracker = run(rounds, session)
        sizes = {event["client_id"]: event["bytes_up"] for event in tracker.of("client")}
        assert sizes["client-000"] < sizes["client-001"] < sizes["client-002"]

    @name
    def test_the_penalty_presses_the_tail_down(self, rounds: ExperimentConfig, session: Session, name: str):
        def tail(plan: TrainPlan, start: AdapterState) -> float:
            seed = client_seed(0, 1, "client-002")
            result = session.trainer.run(start, plan, session.local_data("client-002"), seed=seed)
            assert result.metrics["train_loss"] > 0
            after = {n: t + result.delta[n] for n, t in start.tensors.items()}
            return sum(
                float(pair.factor_b[:, 2:].norm() * pair.factor_a[2:].norm())
                for pair in replace(start, tensors=after).pairs()
            )

        begun = run(replace(rounds, rounds=1, strategy=replace(rounds.strategy, options={})), session)[0]
        start = begun.server.adapter
        plain = TrainPlan(rank=4)
        assert tail(replace(plain, tail_penalty=20.0, tail_start=2), start) < tail(plain, start)
        assert tail(replace(plain, tail_penalty=20.0, tail_start=4), start) == tail(plain, start)

    @pytest.mark.parametrize("name", ["hetlora"])
    @pytest.mark.parametrize(
        "change",
        [
            {"tail_penalty": -1.0},
            {"tail_penalty": "much"},
            {"tail_start": -2},
            {"tail_start": 1.5},
            {"upload": "everything"},
            {"cached": 1},
            {"sketch_columns": -1},
            {"sketch_seed": True},
        ],
        ids=str,
    )
    def test_a_plan_that_is_none_is_refused(self, change: dict[str, Any], name: str):
        task = asdict(Assignment("run", "one", 1, "t", "v", "b", TrainPlan()))
        task["plan"] |= change
        with pytest.raises(WireError, match="no task of this protocol"):
            Assignment.from_json(canonical_json(task).decode())


@pytest.mark.parametrize("name", ["flexlora with feedback"])
def test_what_is_carried_is_in_the_memory_and_in_the_report(
    rounds: ExperimentConfig, session: Session, name: str
) -> None:
    strategy, tracker = run(replace(rounds, adapter=replace(rounds.adapter, client_ranks=())), session)
    tensors = strategy.server.global_state.rule_state.tensors
    assert {name.rpartition(".")[2] for name in tensors} == {"remainder_left", "remainder_right"}
    for event in tracker.of("round"):
        assert 0 < event["rule"]["remainder_carried"] < 1
        assert event["rule"]["remainder_rank"] <= 4
    assert not any("remainder" in entry.name for entry in strategy.server.global_state.materialise().layout())


@pytest.mark.parametrize("name", ["lora_fair", "lora_fair by ridge"])
def test_the_correction_narrows_the_gap(rounds: ExperimentConfig, session: Session, name: str) -> None:
    _, tracker = run(rounds, session)
    for event in tracker.of("round"):
        assert event["rule"]["gap"] < event["rule"]["gap_mean"]
