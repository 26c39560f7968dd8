"""What a client remembers against its own drift: which record counts, and that a round asked for twice is the same."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from federated.config import ExperimentConfig
from federated.corrections import SHIFT, VARIATE
from federated.errors import DataError
from federated.flower import Session, handle_train
from federated.flower.adapter_packets import adapter_packet
from federated.flower.client_steering import Steering
from federated.flower.client_store import ClientStore
from federated.flower.records import Assignment, Reply, task_content
from federated.manifest import TrainPlan
from federated.state import AdapterState, from_raw
from federated.training import client_seed
from federated.wire import decode_packet

CLIENT = "client-001"
Make = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "store", run_id="run", client_id=CLIENT)


def sent(adapter: AdapterState, variate: float = 0.0) -> AdapterState:
    extra = {VARIATE + name: torch.full(tensor.shape, variate) for name, tensor in adapter.tensors.items()}
    return replace(adapter, extra=extra)


def plan(memory_round: int = 0, correction: str = "feddyn") -> TrainPlan:
    return TrainPlan(correction=correction, memory_round=memory_round, proximal_mu=1.0)


def train(store: ClientStore, adapter: AdapterState, *, number: int, taken: int, move: float) -> float:
    """One round's training by ``move`` in every entry; returns the memory that it began with."""
    steering = Steering(store, plan(taken), sent(adapter), round_number=number)
    found = steering.steered(adapter, learning_rate=0.1).extra[f"{SHIFT}q.factor_a"]
    steering.remember({name: torch.full(one.shape, move) for name, one in adapter.tensors.items()}, steps=4)
    assert (found == found[0, 0]).all()
    return float(found[0, 0])


def test_a_memory_grows_with_every_update_that_was_taken(store: ClientStore, adapter: Make) -> None:
    begun = [train(store, adapter(), number=number, taken=number - 1, move=number) for number in range(1, 6)]
    assert begun == [0.0, 1.0, 3.0, 6.0, 10.0]


def test_an_update_that_was_not_taken_is_not_in_it(store: ClientStore, adapter: Make) -> None:
    train(store, adapter(), number=1, taken=0, move=1.0)
    assert train(store, adapter(), number=2, taken=1, move=5.0) == 1.0
    assert train(store, adapter(), number=3, taken=1, move=7.0) == 1.0
    assert train(store, adapter(), number=4, taken=1, move=9.0) == 1.0
    assert train(store, adapter(), number=9, taken=4, move=2.0) == 10.0


def test_the_first_updates_may_be_lost_too(store: ClientStore, adapter: Make) -> None:
    train(store, adapter(), number=1, taken=0, move=1.0)
    assert train(store, adapter(), number=2, taken=0, move=5.0) == 0.0
    assert train(store, adapter(), number=3, taken=2, move=5.0) == 5.0


def test_a_round_that_is_asked_for_again_begins_with_the_same_and_counts_once(
    store: ClientStore, adapter: Make
) -> None:
    train(store, adapter(), number=1, taken=0, move=1.0)
    train(store, adapter(), number=2, taken=1, move=2.0)
    assert train(store, adapter(), number=2, taken=1, move=2.5) == 1.0
    assert train(store, adapter(), number=3, taken=2, move=4.0) == 3.5


def test_a_run_that_is_resumed_further_back_goes_on_from_there(store: ClientStore, adapter: Make) -> None:
    for number in range(1, 5):
        train(store, adapter(), number=number, taken=number - 1, move=1.0)
    assert train(store, adapter(), number=3, taken=2, move=8.0) == 2.0
    assert train(store, adapter(), number=4, taken=3, move=1.0) == 10.0


def test_a_run_that_begins_anew_forgets(store: ClientStore, adapter: Make) -> None:
    for number in range(1, 4):
        train(store, adapter(), number=number, taken=number - 1, move=1.0)
    assert train(store, adapter(), number=1, taken=0, move=8.0) == 0.0
    assert train(store, adapter(), number=2, taken=1, move=8.0) == 8.0


def test_a_memory_that_is_lost_begins_anew_and_says_so(
    store: ClientStore, adapter: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert train(store, adapter(), number=7, taken=5, move=1.0) == 0.0
    assert "no longer holds what it remembered in round 5" in caplog.text
    assert train(store, adapter(), number=8, taken=7, move=1.0) == 1.0


def test_scaffold_s_newcomer_takes_the_server_s_variate(store: ClientStore, adapter: Make) -> None:
    steering = Steering(store, plan(correction="scaffold"), sent(adapter(), 0.5), round_number=1)
    assert not steering.steered(adapter(), learning_rate=0.1).extra[f"{SHIFT}q.factor_a"].any()
    steering.remember({name: torch.full(one.shape, 2.0) for name, one in adapter().tensors.items()}, steps=4)
    later = Steering(store, plan(1, "scaffold"), sent(adapter(), 0.25), round_number=2)
    shift = later.steered(adapter(), learning_rate=0.1).extra[f"{SHIFT}q.factor_a"]
    torch.testing.assert_close(shift, torch.full((2, 3), (2.0 / 4 - 0.25) / 0.1))


def test_without_a_correction_nothing_is_added_or_written(store: ClientStore, adapter: Make) -> None:
    hostile = replace(adapter(), extra={f"{SHIFT}q.factor_a": torch.ones(2, 3), "other": torch.ones(1)})
    steering = Steering(store, TrainPlan(), hostile, round_number=1)
    assert set(steering.steered(hostile, learning_rate=0.1).extra) == {"other"}
    steering.remember({}, steps=1)
    assert not store.folder.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: b"x" * 100, "is damaged"),
    ],
    ids=["cut", "empty", "garbage"],
)
def test_a_damaged_store_is_named(
    store: ClientStore, adapter: Make, change: Callable[[bytes], bytes], message: str
) -> None:
    train(store, adapter(), number=1, taken=0, move=1.0)
    (path,) = store.folder.rglob("steering")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{message}.*; set that folder aside to start anew"):
        train(store, adapter(), number=2, taken=1, move=1.0)


@pytest.mark.parametrize("other", [plan(1, "scaffold"), replace(plan(1), trainable=("factor_a",))], ids=str)
def test_another_method_s_or_adapter_s_memory_is_named(store: ClientStore, adapter: Make, other: TrainPlan) -> None:
    train(store, adapter(), number=1, taken=0, move=1.0)
    with pytest.raises(DataError, match="holds another adapter's memory; set that folder aside to start anew"):
        Steering(store, other, sent(adapter()), round_number=2)


class TestWithAModel:
    @pytest.fixture
    def config(self, real_config: ExperimentConfig) -> ExperimentConfig:
        return replace(real_config, train=replace(real_config.train, optimizer="sgd", learning_rate=0.05, steps=3))

    def ask(self, config: ExperimentConfig, session: Session, state: AdapterState, **change: Any) -> Reply:
        base = session.adapter.base.base_digest
        parts = {"round_number": 1, "task_token": "f" * 64, "plan": plan(correction="scaffold"), **change}
        task = Assignment("run", CLIENT, parent_version="p" * 64, base_digest=base, **parts)
        node = {"partition-id": 1, "num-partitions": 3}
        context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={})
        content = task_content(task, config, adapter_packet(state))
        return Reply.from_message(handle_train(Message(content, 2, "train"), context))

    def delta(self, reply: Reply) -> dict[str, torch.Tensor]:
        assert reply.packet is not None, reply.message
        return from_raw(decode_packet(reply.packet)[1])

    def test_the_second_round_is_what_local_training_with_the_shift_gives(
        self, config: ExperimentConfig, real_session: Session
    ):
        from federated.flower import open_session

        session = open_session(config)
        state = sent(real_session.initial, 0.0)
        first = self.delta(self.ask(config, session, state))
        server = {name: 0.7 * tensor / 3 for name, tensor in first.items()}
        state = replace(state, extra={VARIATE + name: tensor for name, tensor in server.items()})
        asked = {"round_number": 2, "plan": replace(plan(1, "scaffold"), proximal_mu=0.0)}
        found = self.delta(self.ask(config, session, state, **asked))
        own = {name: tensor / 3 for name, tensor in first.items()}
        shift = {SHIFT + name: (own[name] - server[name]) / 0.05 for name in own}
        seed = client_seed(config.seed, 2, CLIENT)
        expected = session.trainer.run(
            replace(state, extra=shift), TrainPlan(rank=2), session.local_data(CLIENT), seed=seed
        )
        for name, tensor in expected.delta.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-7)

    def test_a_second_asking_gives_the_same_update(self, config: ExperimentConfig, real_session: Session):
        state = sent(real_session.initial, 0.01)
        self.ask(config, real_session, state)
        asked = {"round_number": 2, "plan": plan(1, "scaffold")}
        first = self.delta(self.ask(config, real_session, state, **asked))
        again = self.delta(self.ask(config, real_session, state, **asked, task_token="e" * 64))
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())

    @pytest.mark.parametrize("number", [-1, "../../evil", 1.5, True])
    def test_a_round_that_is_no_number_never_reaches_the_disk(
        self, config: ExperimentConfig, real_session: Session, number: Any, tmp_path: Path
    ):
        asked = replace(plan(correction="scaffold"), memory_round=number)
        reply = self.ask(config, real_session, sent(real_session.initial), plan=asked)
        assert (reply.reason, reply.packet) == ("WireError", None)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "change",
        [{"correction": "evil"}, {"correction": 1}, {"density_up": 0.0}, {"density_down": 2.0}, {"rank_budget": -1}],
    )
    def test_a_plan_of_nonsense_is_refused(
        self, config: ExperimentConfig, real_session: Session, change: dict[str, Any]
    ):
        asked = replace(plan(correction="scaffold"), **change)
        reply = self.ask(config, real_session, sent(real_session.initial), plan=asked)
        assert (reply.reason, reply.packet) == ("WireError", None)

    def test_a_variate_that_is_missing_is_a_refusal(self, config: ExperimentConfig, real_session: Session):
        reply = self.ask(config, real_session, real_session.initial)
        assert (reply.reason, reply.packet) == ("WireError", None)
        assert "the server's control variate is missing" in (reply.message or "")
