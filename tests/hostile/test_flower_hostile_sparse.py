"""Sparse updates from one hostile client: each fault costs that client its update, with a reason, and nobody else's.

Three honest fake clients and one that is not, under the rules whose updates say which values they hold. The global
adapter must come out bit for bit as if the hostile one had not been there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from federated.aggregation import make_rule
from federated.config import experiment_from
from federated.flower import DeltaStrategy, InProcessGrid
from federated.flower.adapter_packets import parse_adapter_packet
from federated.flower.records import Assignment, assignment_of, packet_of, reply_content
from federated.manifest import AdapterSpec, ModuleSpec
from federated.state import AdapterState, Tensors, group_of, to_raw
from federated.tracking import MemoryTracker
from federated.uploads import pack
from federated.wire import seal_update

BASE = "b" * 64
MODULES = (ModuleSpec("k", 5, 3, 2, 4.0), ModuleSpec("q", 5, 3, 2, 4.0))
SPEC = AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=MODULES)
HOSTILE = "client-003"
RULES: dict[str, dict[str, Any]] = {"flasc": {"density_down": 0.5, "density_up": 0.25}, "lora_a2": {"rank": 1}}
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_run_id": 1, "_node_id": 0, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


def initial() -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    shapes = {"k.factor_a": (2, 5), "k.factor_b": (3, 2), "q.factor_a": (2, 5), "q.factor_b": (3, 2)}
    return AdapterState(SPEC, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def packed(task: Assignment, received: AdapterState) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(int(task.client_id[-3:]) + 10 * task.round_number)
    trained = {name: one for name, one in received.tensors.items() if group_of(name) in task.plan.trainable}
    delta = {name: torch.randn(one.shape, generator=generator) for name, one in sorted(trained.items())}
    return dict(pack(task.plan, received, delta))


def client_app(change: Change | None) -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        name = f"client-{int(str(context.node_config['partition-id'])):03d}"
        return Message(reply_content(name, "", {}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = assignment_of(message)
        received = parse_adapter_packet(packet_of(message.content))
        if task.plan.mode == "evaluate":
            return Message(reply_content(task.client_id, task.task_token, {}), reply_to=message)
        tensors = packed(task, received)
        if change is not None and task.client_id == HOSTILE:
            tensors = change(tensors)
        packet = seal_update(
            to_raw(tensors),
            run_id=task.run_id,
            client_id=task.client_id,
            round_number=task.round_number,
            phase=task.plan.phase,
            task_token=task.task_token,
            counter=task.round_number,
            parent_version=task.parent_version,
            base_digest=task.base_digest,
            spec=received.spec,
            plan_digest=task.plan.digest,
            num_examples=10,
        )
        return Message(reply_content(task.client_id, task.task_token, {}, packet), reply_to=message)

    return app


def run(name: str, clients: int, change: Change | None = None) -> tuple[Tensors, list[dict[str, Any]]]:
    plain = {"task": {"labels": ["a", "b"]}, "rounds": 2, "round": {"poll_interval": 0.005}}
    config = experiment_from({**plain, "strategy": {"rule": name, "options": RULES[name]}})
    tracker = MemoryTracker(clock=lambda: 0.0)
    strategy = DeltaStrategy(
        config,
        initial=initial(),
        base_digest=BASE,
        rule=make_rule(name, RULES[name]),
        tracker=tracker,
        run_id="run",
    )
    with InProcessGrid(client_app(change), clients) as grid:
        strategy.start(grid)
    return strategy.server.adapter.tensors, tracker.of("client")


def set_to(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: {**tensors, name: value(tensors[name].clone())}


def flipped(bit: int) -> Callable[[Tensor], Tensor]:
    """Another bit of the high parts: one position more, or less."""

    def flip(bits: Tensor) -> Tensor:
        bits[2 + bit // 8] ^= 1 << bit % 8
        return bits

    return flip


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda values: torch.full_like(values, value)


def without(name: str) -> Change:
    return lambda tensors: {key: one for key, one in tensors.items() if key != name}


VALUES, POSITIONS = "sparse:values", "sparse:positions"
RANKS, CHOSEN = "ranks:values", "ranks:chosen"
FAULTS: dict[str, tuple[str, Change, str]] = {
    "sparse: a NaN": ("flasc", set_to(VALUES, filled(torch.nan)), "not_finite"),
    "sparse: an infinity": ("flasc", set_to(VALUES, filled(torch.inf)), "not_finite"),
    "sparse: repeated positions": ("flasc", set_to(POSITIONS, torch.zeros_like), "bad_positions"),
    "sparse: all bits": ("flasc", set_to(POSITIONS, lambda bits: bits.fill_(255)), "bad_positions"),
    "sparse: one position more": ("flasc", set_to(POSITIONS, flipped(0)), "bad_positions"),
    "sparse: too few values": ("flasc", set_to(VALUES, lambda values: values[:-1]), "layout_mismatch"),
    "sparse: too many positions": (
        "flasc",
        set_to(POSITIONS, lambda bits: torch.cat([bits, bits])),
        "layout_mismatch",
    ),
    "sparse: positions of 64 bits": ("flasc", set_to(POSITIONS, lambda bits: bits.long()), "layout_mismatch"),
    "sparse: no positions": ("flasc", without(POSITIONS), "layout_mismatch"),
    "sparse: whole tensors": ("flasc", lambda _: dict(initial().tensors), "layout_mismatch"),
    "ranks: a NaN": ("lora_a2", set_to(RANKS, filled(torch.nan)), "not_finite"),
    "ranks: all of them": ("lora_a2", set_to(CHOSEN, lambda bits: bits.fill_(15)), "bad_positions"),
    "ranks: one that is not there": ("lora_a2", set_to(CHOSEN, lambda bits: bits | 128), "bad_positions"),
    "ranks: none, with values": ("lora_a2", set_to(CHOSEN, torch.zeros_like), "bad_positions"),
    "ranks: no marks": ("lora_a2", without(CHOSEN), "layout_mismatch"),
}


@pytest.mark.parametrize(("name", "change", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_fault_costs_its_sender_the_update_and_nobody_else(name: str, change: Change, reason: str) -> None:
    expected, _ = run(name, 3)
    found, events = run(name, 4, change)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    by_client = {(event["round_number"], event["client_id"]): event for event in events}
    for (_, client), event in by_client.items():
        assert (event["status"], event["reason"]) == (("refused", reason) if client == HOSTILE else ("ok", None))
    assert len(by_client) == 8


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_same_client_without_a_fault_is_taken(name: str) -> None:
    alone, _ = run(name, 3)
    found, events = run(name, 4, lambda tensors: tensors)
    assert {event["status"] for event in events} == {"ok"}
    assert any(not torch.equal(found[key], tensor) for key, tensor in alone.items())


def test_a_message_names_no_value() -> None:
    _, events = run("flasc", 4, set_to(POSITIONS, torch.zeros_like))
    (text, *_) = [event["message"] for event in events if event["client_id"] == HOSTILE]
    assert text.startswith("0 positions; expected 8; the update does not say which values it holds")
