"""FedASK through real clients and messages: two exchanges, one training; what is sent twice, lost, or gone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federated.adapters import shell
from federated.aggregation import ClientView, FedASK, make_rule
from federated.config import ExperimentConfig
from federated.delta import apply_some
from federated.flower import DeltaStrategy, InProcessGrid, Session, TrainingState, handle_query, handle_train
from federated.flower.adapter_packets import adapter_packet
from federated.flower.client_store import ClientStore
from federated.flower.records import Assignment, Reply, assignment_of, task_content
from federated.global_state import GlobalState
from federated.manifest import TrainPlan
from federated.sketches import projected, sketched
from federated.state import AdapterState, RuleState, from_raw
from federated.testing import effective_of
from federated.tracking import MemoryTracker
from federated.training import LocalTrainer, client_seed
from federated.wire import decode_packet

CLIENT = "client-001"
Ask = Callable[..., Reply]


@pytest.fixture
def rounds(real_config: ExperimentConfig) -> ExperimentConfig:
    """Three rounds of two of three clients, who learn enough to be told apart."""
    return replace(
        real_config,
        rounds=3,
        strategy=replace(real_config.strategy, rule="fedask"),
        selection=replace(real_config.selection, fraction=0.6),
        train=replace(real_config.train, learning_rate=0.05, steps=2),
    )


def answering(**answers: Callable[[Message], Message | None]) -> ClientApp:
    """Real clients, some of which answer otherwise when the answer is not None."""
    app = ClientApp()
    app.query()(handle_query)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = assignment_of(message)
        other = answers.get(task.client_id.replace("-", "_"))
        return (other and other(message)) or handle_train(message, context)

    return app


def run(
    config: ExperimentConfig, session: Session, *, app: ClientApp | None = None, **parts: Any
) -> tuple[DeltaStrategy, MemoryTracker]:
    tracker = MemoryTracker(clock=lambda: 0.0)
    given = {"base_digest": session.adapter.base.base_digest, "tracker": tracker, "run_id": "run", **parts}
    strategy = DeltaStrategy(config, initial=parts.pop("initial", session.initial), **given)
    with InProcessGrid(app or answering(), 3) as grid:
        strategy.start(grid)
    return strategy, tracker


def test_three_rounds_make_what_flexlora_makes(rounds: ExperimentConfig, real_session: Session) -> None:
    """The same clients, seeds and cohorts: one sees every update, the other only sums."""
    found, tracker = run(rounds, real_session)
    flex = replace(rounds, strategy=replace(rounds.strategy, rule="flexlora"))
    expected, _ = run(flex, real_session)
    assert len({tuple(event["cohort"]) for event in tracker.of("round_start")}) > 1
    for layer, matrix in effective_of(expected.server.adapter).items():
        assert float(matrix.norm()) > 0.01
        assert float((effective_of(found.server.adapter)[layer] - matrix).norm()) < 1e-3 * float(matrix.norm())
    for name, tensor in expected.server.adapter.dense().items():
        torch.testing.assert_close(found.server.adapter.tensors[name], tensor, rtol=1e-3, atol=1e-5)
    assert [event["rule"]["uncovered_layers"] for event in tracker.of("round")] == [0.0, 0.0, 0.0]
    assert found.server.global_state.rule_state.scalars == {"turn": 3}


def test_one_round_is_flexlora_s_to_the_rounding(rounds: ExperimentConfig, real_session: Session) -> None:
    found, _ = run(replace(rounds, rounds=1), real_session)
    flex = replace(rounds, rounds=1, strategy=replace(rounds.strategy, rule="flexlora"))
    expected, _ = run(flex, real_session)
    for layer, matrix in effective_of(expected.server.adapter).items():
        assert float((effective_of(found.server.adapter)[layer] - matrix).norm()) < 1e-6 * float(matrix.norm())
    assert all(torch.equal(found.server.adapter.tensors[n], t) for n, t in expected.server.adapter.dense().items())


def test_mixed_ranks_from_end_to_end(rounds: ExperimentConfig, real_session: Session) -> None:
    mixed = replace(rounds, adapter=replace(rounds.adapter, client_ranks=(1, 2)))
    found, tracker = run(mixed, real_session)
    expected, _ = run(replace(mixed, strategy=replace(mixed.strategy, rule="flexlora")), real_session)
    assert all(event["published"] for event in tracker.of("round"))
    for layer, matrix in effective_of(expected.server.adapter).items():
        assert float((effective_of(found.server.adapter)[layer] - matrix).norm()) < 1e-3 * float(matrix.norm())


def test_clients_train_once_a_round(rounds: ExperimentConfig, real_session: Session, monkeypatch: Any) -> None:
    trained = []
    true_run = LocalTrainer.run

    def counted(self: LocalTrainer, state: AdapterState, plan: TrainPlan, *args: Any, **named: Any) -> Any:
        trained.append((plan.mode, plan.phase))
        return true_run(self, state, plan, *args, **named)

    monkeypatch.setattr(LocalTrainer, "run", counted)
    _, tracker = run(replace(rounds, engine=replace(rounds.engine, workers=1)), real_session)
    assert [phase for mode, phase in trained if mode == "train"] == [1] * 6
    assert len(tracker.of("client")) == 12


def test_a_round_counts_both_exchanges_bytes(rounds: ExperimentConfig, real_session: Session) -> None:
    _, tracker = run(replace(rounds, rounds=1), real_session)
    clients, (event,) = tracker.of("client"), tracker.of("round")
    assert event["bytes_up"] == sum(one["bytes_up"] for one in clients)
    assert event["bytes_down"] == sum(one["bytes_down"] for one in clients)
    assert event["train_loss"] is not None
    assert event["participants"] == 2


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    rounds: ExperimentConfig, real_session: Session, stop: int
) -> None:
    whole, _ = run(rounds, real_session)
    first, _ = run(replace(rounds, rounds=stop), real_session)
    saved = TrainingState.from_bytes(first.server.training_state(stop).to_bytes())
    again, _ = run(rounds, real_session, resume=(saved, first.version_id))
    assert all(torch.equal(again.server.adapter.tensors[n], t) for n, t in whole.server.adapter.tensors.items())
    assert again.server.global_state.rule_state == RuleState({"turn": 3})


def test_a_device_serves_what_the_server_made(rounds: ExperimentConfig, real_session: Session) -> None:
    made = run(rounds, real_session)[0].server.global_state
    served = shell(real_session.adapter.base, made.export().spec)
    served.write(made.export())
    for layer, matrix in effective_of(made.adapter).items():
        torch.testing.assert_close(effective_of(served.read())[layer], matrix, rtol=1e-5, atol=1e-7)


class TestALostClient:
    @staticmethod
    def lost_in(phases: set[int]) -> Callable[[Message], Message | None]:
        def answer(message: Message) -> Message | None:
            if assignment_of(message).plan.phase not in phases:
                return None
            return Message(RecordDict(), reply_to=message)

        return answer

    def everybody(self, config: ExperimentConfig) -> ExperimentConfig:
        return replace(config, rounds=1, selection=replace(config.selection, fraction=1.0))

    def test_the_others_start_over_from_what_they_hold(self, rounds: ExperimentConfig, real_session: Session):
        config = self.everybody(rounds)
        found, tracker = run(config, real_session, app=answering(client_001=self.lost_in({2})))
        (event,) = tracker.of("round")
        assert (event["participants"], event["published"], event["rule"]["sketches"]) == (2, True, 2.0)
        assert [one["client_id"] for one in event["refused"]] == ["client-001"]
        flex = replace(config, strategy=replace(config.strategy, rule="flexlora"))
        expected, _ = run(flex, real_session, app=answering(client_001=self.lost_in({1})))
        for layer, matrix in effective_of(expected.server.adapter).items():
            assert float((effective_of(found.server.adapter)[layer] - matrix).norm()) < 1e-6 * float(matrix.norm())

    def test_it_ends_when_clients_are_lost_again_and_again(self, rounds: ExperimentConfig, real_session: Session):
        """Two of three are the quorum; the round is missed and the adapter stays."""
        app = answering(client_001=self.lost_in({2}), client_002=self.lost_in({4}))
        found, tracker = run(self.everybody(rounds), real_session, app=app)
        (event,) = tracker.of("round")
        assert not event["published"]
        assert "1 good updates of 2, the quorum is 2" in event["message"]
        assert all(torch.equal(found.server.adapter.tensors[n], t) for n, t in real_session.initial.tensors.items())

    def test_a_client_whose_store_is_gone_is_lost_too(
        self, rounds: ExperimentConfig, real_session: Session, tmp_path: Path
    ):
        def forgets(message: Message) -> Message | None:
            task = assignment_of(message)
            if task.plan.phase == 2:
                store = ClientStore(tmp_path / "clients", run_id=task.run_id, client_id=task.client_id)
                (store.folder / str(task.round_number) / "trained").unlink()
            return None

        _, tracker = run(self.everybody(rounds), real_session, app=answering(client_001=forgets))
        (event,) = tracker.of("round")
        assert (event["participants"], event["published"]) == (2, True)
        ((who, why),) = [(one["client_id"], one["message"]) for one in event["refused"]]
        assert who == "client-001"
        assert "holds nothing of it" in why

    def test_another_claim_of_examples_in_the_second_phase_is_refused(
        self, rounds: ExperimentConfig, real_session: Session
    ):
        class Doubting(FedASK):
            def start(self, state: GlobalState, phase: int):
                inner = super().start(state, phase)
                true_add = inner.add
                inner.add = lambda update, weight: true_add(  # type: ignore[method-assign]
                    update, weight * (5 if phase == 2 and update.client_id == "client-001" else 1)
                )
                return inner

        _, tracker = run(self.everybody(rounds), real_session, rule=Doubting())
        (event,) = tracker.of("round")
        assert event["participants"] == 2
        assert [(one["client_id"], one["reason"]) for one in event["refused"]] == [("client-001", "not_combinable")]


class TestAClient:
    """One client, asked phase by phase."""

    @pytest.fixture
    def state(self, real_session: Session) -> GlobalState:
        return GlobalState(real_session.initial, rule_state=FedASK().init(real_session.initial.spec))

    @pytest.fixture
    def ask(self, real_config: ExperimentConfig, real_session: Session) -> Ask:
        base = real_session.adapter.base.base_digest

        def send(
            state: GlobalState, phase: int, *, sign: str = "f", parent: str = "p", rank: int | None = None
        ) -> Reply:
            plan, payload = FedASK().plan(state, ClientView(CLIENT, rank), phase)
            task = Assignment("run", CLIENT, 1, sign * 64, parent * 64, base, plan)
            content = task_content(task, real_config, adapter_packet(payload))
            context = Context(
                run_id=1,
                node_id=2,
                node_config={"partition-id": 1, "num-partitions": 3},
                state=RecordDict(),
                run_config={},
            )
            return Reply.from_message(handle_train(Message(content, 2, "train"), context))

        return send

    @pytest.fixture
    def second(self, state: GlobalState) -> GlobalState:
        """A state of phase 2, with bases that the server might have made."""
        generator = torch.Generator().manual_seed(0)
        bases = {
            f"{one.name}.basis": torch.linalg.qr(torch.randn(one.d_out, 5, generator=generator)).Q
            for one in state.adapter.spec.modules
        }
        return replace(state, rule_state=RuleState({"turn": 0, "weights": {CLIENT: 8.0}}, bases))

    @staticmethod
    def tensors(reply: Reply) -> dict[str, torch.Tensor]:
        assert reply.packet is not None, reply.message
        return from_raw(decode_packet(reply.packet)[1])

    @staticmethod
    def after(session: Session, config: ExperimentConfig, state: GlobalState) -> AdapterState:
        """What local training alone gives."""
        seed = client_seed(config.seed, 1, CLIENT)
        received = state.materialise()
        result = session.trainer.run(received, TrainPlan(rank=2), session.local_data(CLIENT), seed=seed)
        return apply_some(received, result.delta)

    def test_both_messages_are_of_the_factors_that_it_trained(
        self, ask: Ask, state: GlobalState, second: GlobalState, real_session: Session, real_config: ExperimentConfig
    ):
        after = self.after(real_session, real_config, state)
        plan, _ = FedASK().plan(state, ClientView(CLIENT), 1)
        first = self.tensors(ask(state, 1))
        for name, tensor in sketched(after, columns=plan.sketch_columns, seed=plan.sketch_seed).items():
            assert torch.equal(first.pop(name), tensor)
        assert set(first) == set(state.adapter.dense())
        found = self.tensors(ask(second, 2))
        expected = projected(after, second.rule_state.tensors)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], t) for n, t in expected.items())

    def test_a_new_sketch_is_the_first_one_again(self, ask: Ask, state: GlobalState):
        first, third = self.tensors(ask(state, 1)), self.tensors(ask(state, 3))
        assert first.keys() == third.keys()
        assert all(torch.equal(third[n], t) for n, t in first.items())

    def test_the_second_phase_neither_trains_nor_reads_data(
        self, ask: Ask, state: GlobalState, second: GlobalState, monkeypatch: pytest.MonkeyPatch
    ):
        ask(state, 1)

        def never(*args: Any, **named: Any) -> Any:
            raise RuntimeError("not in this phase")

        monkeypatch.setattr(LocalTrainer, "run", never)
        monkeypatch.setattr(Session, "local_data", never)
        reply = ask(second, 2)
        assert reply.reason is None
        assert not reply.metrics
        header, _, _ = decode_packet(reply.packet or b"")
        assert (header["num_examples"], header["phase"]) == (8, 2)

    @pytest.mark.parametrize("phase", [1, 2, 3])
    def test_a_task_that_is_sent_again_is_answered_alike(
        self, ask: Ask, state: GlobalState, second: GlobalState, phase: int
    ):
        ask(state, 1)
        given = second if phase == 2 else state
        one, other = ask(given, phase), ask(given, phase)
        assert one.packet is not None
        assert one.packet == other.packet

    @pytest.mark.parametrize(
        "change",
        [{"parent": "q"}, {"rank": 1}, {"gone": True}, {"damaged": True}],
        ids=lambda change: next(iter(change)),
    )
    def test_without_its_factors_it_says_so(
        self, ask: Ask, state: GlobalState, second: GlobalState, tmp_path: Path, change: dict[str, Any]
    ):
        ask(state, 1)
        store = ClientStore(tmp_path / "clients", run_id="run", client_id=CLIENT)
        if change.pop("gone", False):
            (store.folder / "1" / "trained").unlink()
        if change.pop("damaged", False):
            (store.folder / "1" / "trained").write_bytes(b"FPFT, once")
        reply = ask(second, 2, **change)
        assert (reply.reason, reply.packet) == ("DataError", None)
        assert "phase 2 of round 1 goes on from what this client trained in phase 1" in (reply.message or "")
        assert str(tmp_path) not in (reply.message or "")

    def test_a_server_that_starts_the_round_again_is_answered_from_the_new_training(
        self, ask: Ask, state: GlobalState, second: GlobalState, real_session: Session
    ):
        """The server was stopped in the middle of a round: another token, another version."""
        ask(state, 1)
        moved = {n: t + 0.01 for n, t in state.adapter.tensors.items()}
        fresh = replace(state, adapter=replace(state.adapter, tensors=moved))
        before = self.tensors(ask(second, 2))
        ask(fresh, 1, sign="e", parent="q")
        later = replace(second, adapter=fresh.adapter)
        after = self.tensors(ask(later, 2, sign="e", parent="q"))
        assert any(not torch.equal(after[n], t) for n, t in before.items())

    def test_a_basis_that_is_missing_is_named(self, ask: Ask, state: GlobalState, second: GlobalState):
        ask(state, 1)
        some = dict(list(second.rule_state.tensors.items())[1:])
        plan_state = replace(second, rule_state=replace(second.rule_state, tensors=some))
        reply = ask(plan_state, 2)
        assert reply.reason == "AggregationError"
        assert "basis of layer" in (reply.message or "")

    def test_nothing_trained_stays_once_the_next_rounds_are_over(self, ask: Ask, state: GlobalState, tmp_path: Path):
        ask(state, 1)
        store = ClientStore(tmp_path / "clients", run_id="run", client_id=CLIENT)
        assert store.get(1, "trained") is not None
        for number in (2, 3):
            store.put(number, "answer", b"x")
        assert store.get(1, "trained") is None


def test_the_rule_of_a_config_takes_its_options(rounds: ExperimentConfig) -> None:
    rule = make_rule("fedask", {"oversample": 3, "seed": 5})
    assert (rule.oversample, rule.seed) == (3, 5)
