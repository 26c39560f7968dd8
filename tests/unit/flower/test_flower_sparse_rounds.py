"""Whole rounds of rules that send parts, or remember: what clients begin with, what is measured, whose memory it is."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.clientapp import ClientApp

from federated.aggregation import Rule, make_rule
from federated.config import ExperimentConfig, ServerOptimizerConfig
from federated.delta import Update
from federated.flower import DeltaStrategy, InProcessGrid, Session, TrainingState, handle_query, handle_train
from federated.flower.client_store import ClientStore
from federated.state import AdapterState, Tensors, from_raw
from federated.tracking import MemoryTracker
from federated.wire import decode_packet


def run(
    config: ExperimentConfig, session: Session, rule: Rule, *, resume: tuple[TrainingState, str] | None = None
) -> tuple[DeltaStrategy, MemoryTracker]:
    app = ClientApp()
    app.query()(handle_query)
    app.train()(handle_train)
    tracker = MemoryTracker(clock=lambda: 0.0)
    strategy = DeltaStrategy(
        config,
        initial=session.initial,
        base_digest=session.adapter.base.base_digest,
        rule=rule,
        tracker=tracker,
        run_id="run",
        resume=resume,
    )
    with InProcessGrid(app, 3) as grid:
        strategy.start(grid)
    return strategy, tracker


@pytest.fixture
def three_rounds(real_config: ExperimentConfig) -> ExperimentConfig:
    """Two of three clients a round, plain SGD."""
    return replace(
        real_config,
        rounds=3,
        selection=replace(real_config.selection, fraction=0.6),
        train=replace(real_config.train, learning_rate=0.05, steps=2, optimizer="sgd"),
    )


def nonzero(tensors: Tensors) -> int:
    return sum(int((tensor != 0).sum()) for name, tensor in tensors.items() if "factor" in name)


class TestFLASC:
    def test_clients_begin_with_the_largest_entries_and_versions_hold_all(
        self, three_rounds: ExperimentConfig, real_session: Session, monkeypatch: pytest.MonkeyPatch
    ):
        received: list[AdapterState] = []

        def noted(*args: object, **parts: object) -> Update:
            received.append(parts["received"])
            return Update(*args, **parts)

        monkeypatch.setattr("federated.flower.round_book.Update", noted)
        strategy, _ = run(three_rounds, real_session, make_rule("flasc", {"density_down": 0.2, "density_up": 0.5}))
        size = sum(tensor.numel() for name, tensor in real_session.initial.tensors.items() if "factor" in name)
        assert [nonzero(state.tensors) for state in received] == [math.ceil(0.2 * size)] * 6
        assert nonzero(strategy.server.global_state.export().tensors) > 0.9 * size

    def test_the_bytes_down_fall_too(self, three_rounds: ExperimentConfig, real_session: Session):
        downs = []
        for rule in (make_rule("flasc"), make_rule("flasc", {"density_down": 1})):
            _, tracker = run(three_rounds, real_session, rule)
            downs.append({event["bytes_down"] for event in tracker.of("client") if event["round_number"] == 3})
        assert max(downs[0]) < 0.6 * min(downs[1])

    def test_the_last_evaluation_is_of_what_is_published(self, three_rounds: ExperimentConfig, real_session: Session):
        strategy, tracker = run(three_rounds, real_session, make_rule("flasc"))
        published = strategy.server.global_state.export()
        parts = [real_session.local_data(client).test for client in real_session.source.client_ids]
        found = [real_session.trainer.evaluate(published, features) for features in parts]
        mean = sum(one.loss * one.num_examples for one in found) / sum(one.num_examples for one in found)
        (event,) = tracker.of("final")
        assert event["evaluation"]["loss"] == pytest.approx(mean, rel=1e-6)

    def test_adam_on_the_server_goes_with_it_and_is_resumed(
        self, three_rounds: ExperimentConfig, real_session: Session
    ):
        adam = ServerOptimizerConfig("adam", learning_rate=0.005)
        config = replace(three_rounds, strategy=replace(three_rounds.strategy, server_optimizer=adam))
        whole, _ = run(config, real_session, make_rule("flasc"))
        first, _ = run(replace(config, rounds=2), real_session, make_rule("flasc"))
        saved = TrainingState.from_bytes(first.server.training_state(2).to_bytes())
        again, _ = run(config, real_session, make_rule("flasc"), resume=(saved, first.version_id))
        expected = whole.server.adapter.tensors
        assert all(torch.equal(again.server.adapter.tensors[key], one) for key, one in expected.items())


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_a_client_s_memory_is_what_the_server_s_is_made_of(
    three_rounds: ExperimentConfig, real_session: Session, name: str, tmp_path: Path
) -> None:
    strategy, tracker = run(three_rounds, real_session, make_rule(name))
    taken = strategy.server.global_state.rule_state.scalars["clients"]
    assert {client: entry[0] for client, entry in taken.items()} == {
        event["client_id"]: event["round_number"] for event in tracker.of("client")
    }
    total: dict[str, torch.Tensor] = {}
    for client, (number, weight) in taken.items():
        data = ClientStore(tmp_path / "clients", run_id="run", client_id=client).get(number, "steering")
        for key, tensor in from_raw(decode_packet(data or b"")[1]).items():
            prefix, _, tensor_name = key.partition(":")
            if prefix == str(number):
                total[tensor_name] = total.get(tensor_name, 0.0) + weight * tensor.double()
    shared = sum(entry[1] for entry in taken.values()) if name == "scaffold" else 1.0  # FedDyn's is the sum
    for key, tensor in strategy.server.global_state.rule_state.tensors.items():
        torch.testing.assert_close(tensor, total[key] / shared, rtol=1e-4, atol=1e-6)
