"""A federation with one hostile client: each fault costs that client its update, and the others nothing.

Three honest fake clients and one that follows a script, on the in-process Grid. The global adapter must come out bit
for bit as if the hostile one had not been there.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from federated.config import experiment_from
from federated.errors import DataError
from federated.flower import DeltaStrategy, InProcessGrid
from federated.flower.adapter_packets import parse_adapter_packet
from federated.flower.records import PACKET_STYPE, Assignment, assignment_of, packet_of, refusal_content, reply_content
from federated.manifest import AdapterSpec, ModuleSpec, TrainPlan, canonical_json
from federated.state import AdapterState, to_raw
from federated.tracking import MemoryTracker
from federated.wire import decode_packet, encode_packet, seal_update

BASE = "b" * 64
SPEC = AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=(ModuleSpec("q", 3, 2, 2, 4.0),))
HOSTILE = "client-003"  # the last one: the honest ones keep their names and nodes without it
Answer = Callable[[Message, Assignment], Any]


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_run_id": 1, "_node_id": 0, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


def delta_of(client_id: str) -> dict[str, torch.Tensor]:
    step = (int(client_id[-3:]) + 1) / 7
    return {"q.factor_a": torch.full((2, 3), step), "q.factor_b": torch.full((2, 2), -step / 3)}


def packet_for(
    message: Message, task: Assignment, delta: dict[str, torch.Tensor] | None = None, **changes: Any
) -> bytes:
    """The right packet for a task, or one with some fields of the envelope or the delta replaced."""
    fields: dict[str, Any] = {
        "run_id": task.run_id,
        "client_id": task.client_id,
        "round_number": task.round_number,
        "phase": task.plan.phase,
        "task_token": task.task_token,
        "counter": task.round_number,
        "parent_version": task.parent_version,
        "base_digest": task.base_digest,
        "spec": parse_adapter_packet(packet_of(message.content)).spec,
        "plan_digest": task.plan.digest,
        "num_examples": 10,
    }
    chosen = delta_of(task.client_id) if delta is None else delta
    return seal_update(to_raw(chosen), **{**fields, **changes})


def sends(message: Message, task: Assignment, packet: bytes | None, **metrics: float) -> Message:
    found = {"train_loss": 1.0, "eval_before_loss": 1.0, "eval_before_num_examples": 4.0, **metrics}
    return Message(reply_content(task.client_id, task.task_token, found, packet), reply_to=message)


def honest(message: Message, task: Assignment) -> Message:
    packet = packet_for(message, task) if task.plan.mode == "train" else None
    return sends(message, task, packet)


def federation(
    script: Answer | None,
    *,
    rounds: int = 2,
    wrap: Callable[[Any], Any] = lambda grid: grid,
    workers: int = 1,
    **policy: Any,
) -> tuple[DeltaStrategy, MemoryTracker]:
    """Run it; without a script the fourth client is not there at all."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(reply_content(f"client-{context.node_config['partition-id']:03d}", "", {}), reply_to=message)

    @app.train()
    def train(message: Message, _: Context) -> Message:
        task = assignment_of(message)
        answer = script if task.client_id == HOSTILE and task.plan.mode == "train" and script else honest
        reply: Message = answer(message, task)
        return reply

    quick = {"poll_interval": 0.005, "deadline": 60.0, **policy}
    config = experiment_from({"task": {"labels": ["a", "b"]}, "rounds": rounds, "round": quick})
    initial = AdapterState(SPEC, {name: torch.full(t.shape, 0.25) for name, t in delta_of(HOSTILE).items()})
    tracker = MemoryTracker(clock=lambda: 0.0)
    strategy = DeltaStrategy(config, initial=initial, base_digest=BASE, tracker=tracker, run_id="run", secret=b"key")
    with InProcessGrid(app, 4 if script else 3, workers=workers) as grid:
        strategy.start(wrap(grid))
    return strategy, tracker


def bits(strategy: DeltaStrategy) -> dict[str, bytes]:
    return {name: bytes(raw.data) for name, raw in to_raw(strategy.server.adapter.tensors).items()}


@pytest.fixture(scope="module")
def without() -> dict[int, dict[str, bytes]]:
    """The global adapter after one and two rounds of the honest clients alone."""
    saved = {name: getattr(TaskIdentity, f"_{name}") for name in ("run_id", "node_id", "task_id")}
    found = {rounds: bits(federation(None, rounds=rounds)[0]) for rounds in (1, 2)}
    for name, value in saved.items():
        setattr(TaskIdentity, f"_{name}", value)
    return found


def outcome(tracker: MemoryTracker, number: int = 1) -> dict[str, Any]:
    """The hostile client's event of one round; there must be exactly one."""
    (event,) = [e for e in tracker.of("client") if e["client_id"] == HOSTILE and e["round_number"] == number]
    return event


# ---- envelopes that do not belong here


ENVELOPES: dict[str, tuple[dict[str, Any], str]] = {
    "another run": ({"run_id": "other"}, "wrong_run"),
    "another client's envelope": ({"client_id": "client-000"}, "wrong_client"),
    "an earlier round": ({"round_number": 0}, "wrong_round"),
    "a later round": ({"round_number": 3}, "wrong_round"),
    "another phase": ({"phase": 2}, "wrong_phase"),
    "no token": ({"task_token": ""}, "bad_token"),
    "a made up token": ({"task_token": "f" * 64}, "bad_token"),
    "a counter that does not grow": ({"counter": 0}, "bad_counter"),
    "a counter beyond all": ({"counter": 2**63}, "bad_counter"),
    "another parent": ({"parent_version": "c" * 64}, "wrong_parent"),
    "another base model": ({"base_digest": "c" * 64}, "base_mismatch"),
    "another rank": ({"spec": replace(SPEC, rank=4)}, "spec_mismatch"),
    "another alpha": ({"spec": replace(SPEC, alpha=400.0)}, "spec_mismatch"),
    "another plan": ({"plan_digest": TrainPlan(rank=9).digest}, "plan_mismatch"),
    "a million million examples": ({"num_examples": 10**12}, "bad_num_examples"),
    "no example": ({"num_examples": 0}, "bad_num_examples"),
    "fewer than none": ({"num_examples": -5}, "bad_num_examples"),
}


def changed(name: str, value: float) -> dict[str, torch.Tensor]:
    """The hostile client's delta with one bad value in the middle of one tensor."""
    delta = delta_of(HOSTILE)
    delta[name][1, 1] = value
    return delta


DELTAS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "one NaN": (changed("q.factor_a", math.nan), "not_finite"),
    "one infinity": (changed("q.factor_b", math.inf), "not_finite"),
    "one negative infinity": (changed("q.factor_b", -math.inf), "not_finite"),
    "another rank's shape": ({**delta_of(HOSTILE), "q.factor_a": torch.ones(4, 3)}, "layout_mismatch"),
    "a shape that broadcasts": ({**delta_of(HOSTILE), "q.factor_a": torch.ones(3)}, "layout_mismatch"),
    "a scalar": ({**delta_of(HOSTILE), "q.factor_b": torch.tensor(1.0)}, "layout_mismatch"),
    "a transposed factor": ({**delta_of(HOSTILE), "q.factor_a": torch.ones(3, 2)}, "layout_mismatch"),
    "a missing tensor": ({"q.factor_a": torch.ones(2, 3)}, "layout_mismatch"),
    "a tensor too many": ({**delta_of(HOSTILE), "base.weight": torch.ones(1)}, "layout_mismatch"),
    "other names in the same order": (
        {"q.factor_x": torch.ones(2, 3), "q.factor_y": torch.ones(2, 2)},
        "layout_mismatch",
    ),
    "bfloat16": ({name: t.bfloat16() for name, t in delta_of(HOSTILE).items()}, "layout_mismatch"),
    "float64": ({name: t.double() for name, t in delta_of(HOSTILE).items()}, "layout_mismatch"),
    "integers": ({name: t.long() for name, t in delta_of(HOSTILE).items()}, "layout_mismatch"),
    "nothing": ({}, "layout_mismatch"),
}


def check_refused(script: Answer, reason: str, without: dict[int, dict[str, bytes]], status: str = "refused") -> None:
    """Dropped singly, counted, named with its reason; the others as if it had not been there; the run goes on."""
    strategy, tracker = federation(script)
    assert bits(strategy) == without[2]
    for number in (1, 2):
        event = outcome(tracker, number)
        assert (event["status"], event["reason"]) == (status, reason)
        assert event["message"]
        assert event["message"].isprintable()
        assert len(event["message"]) <= 300
        (closed,) = [e for e in tracker.of("round") if e["round_number"] == number]
        assert closed["refused"] == [{"client_id": HOSTILE, "reason": reason, "message": event["message"]}]
        assert (closed["participants"], closed["cohort"], closed["published"]) == (3, 4, True)
        assert math.isfinite(closed["train_loss"])


@pytest.mark.parametrize("name", ENVELOPES)
def test_an_envelope_that_does_not_belong_here(name: str, without: dict[int, dict[str, bytes]]) -> None:
    changes, reason = ENVELOPES[name]
    check_refused(lambda message, task: sends(message, task, packet_for(message, task, **changes)), reason, without)


@pytest.mark.parametrize("name", DELTAS)
def test_a_delta_that_is_none(name: str, without: dict[int, dict[str, bytes]]) -> None:
    delta, reason = DELTAS[name]
    check_refused(lambda message, task: sends(message, task, packet_for(message, task, delta)), reason, without)


# ---- replies that hold no update


def with_record(record: Any) -> Answer:
    def answer(message: Message, task: Assignment) -> Message:
        content = reply_content(task.client_id, task.task_token, {"train_loss": 1.0})
        if record is not None:
            content["packet"] = record
        return Message(content, reply_to=message)

    return answer


def packed(data: bytes, stype: str = PACKET_STYPE) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)


RECORDS: dict[str, Any] = {
    "no packet": None,
    "bytes in a config": ConfigRecord({"packet": b"bytes"}),
    "metrics for a packet": MetricRecord({"packet": 1.0}),
    "an empty record": ArrayRecord({}),
    "two arrays": ArrayRecord({"packet": packed(b"x"), "more": packed(b"x")}),
    "an array of another name": ArrayRecord({"delta": packed(b"x")}),
    "a numpy array": ArrayRecord({"packet": Array(torch.ones(3).numpy())}),
    "a pickle": ArrayRecord({"packet": packed(b"cos\nsystem\n(S'true'\ntR.", "pickle")}),
    "no bytes": ArrayRecord({"packet": packed(b"")}),
    "garbage": ArrayRecord({"packet": packed(os.urandom(2000))}),
    "zeros": ArrayRecord({"packet": packed(bytes(500))}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_holds_no_update(name: str, without: dict[int, dict[str, bytes]]) -> None:
    check_refused(with_record(RECORDS[name]), "bad_encoding", without)


def test_more_bytes_than_an_update_can_need(without: dict[int, dict[str, bytes]]) -> None:
    check_refused(with_record(ArrayRecord({"packet": packed(bytes(4_000_000))})), "too_large", without)


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_packet_that_was_cut(cut: int, without: dict[int, dict[str, bytes]]) -> None:
    check_refused(lambda m, task: sends(m, task, packet_for(m, task)[:-cut]), "payload_digest_mismatch", without)


def test_a_header_that_was_cut(without: dict[int, dict[str, bytes]]) -> None:
    check_refused(lambda m, task: sends(m, task, packet_for(m, task)[:200]), "bad_encoding", without)


def test_a_payload_that_was_changed_on_the_way(without: dict[int, dict[str, bytes]]) -> None:
    def answer(message: Message, task: Assignment) -> Message:
        header, _, _ = decode_packet(packet_for(message, task))
        return sends(message, task, encode_packet(header, to_raw(delta_of("client-006"))))

    check_refused(answer, "payload_digest_mismatch", without)


@pytest.mark.parametrize(
    "content",
    [RecordDict(), RecordDict({"metrics": MetricRecord({"x": 1})}), RecordDict({"reply": MetricRecord({"x": 1})})],
    ids=["nothing", "metrics only", "another record type"],
)
def test_a_reply_without_a_head(content: RecordDict, without: dict[int, dict[str, bytes]]) -> None:
    check_refused(lambda message, task: Message(content, reply_to=message), "bad_encoding", without)


# ---- clients that fail


def raises(message: Message, task: Assignment) -> Message:
    raise ValueError("boom\nsecond line")


FAILURES: dict[str, tuple[Answer, str]] = {
    "an exception": (raises, "error_2"),
    "an error reply": (lambda m, task: Message(Error(code=7, reason="x" * 5000), reply_to=m), "error_7"),
    "a refusal": (lambda m, task: Message(refusal_content(HOSTILE, DataError("no rows")), reply_to=m), "DataError"),
    "None": (lambda m, task: None, "error_2"),
    "a content without a message": (lambda m, task: RecordDict(), "error_2"),
    "the task itself": (lambda m, task: m, "error_2"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_client_that_fails(name: str, without: dict[int, dict[str, bytes]]) -> None:
    answer, reason = FAILURES[name]
    check_refused(answer, reason, without, status="failed")


def test_a_client_whose_process_dies(without: dict[int, dict[str, bytes]]) -> None:
    strategy, tracker = federation(lambda message, task: os._exit(3), workers=2)
    assert bits(strategy) == without[2]
    for number in (1, 2):
        event = outcome(tracker, number)
        assert (event["status"], event["reason"]) == ("failed", "error_0")
        assert event["message"] == "the worker process ended with exit code 3"


def test_a_client_that_is_late(without: dict[int, dict[str, bytes]]) -> None:
    strategy, tracker = federation(lambda message, task: time.sleep(600), rounds=1, workers=2, deadline=3.0)
    assert bits(strategy) == without[1]
    event = outcome(tracker)
    assert (event["status"], event["reason"]) == ("late", "deadline")
    assert tracker.of("round")[0]["refused"][0]["client_id"] == HOSTILE


# ---- replays and duplicates


def test_last_round_s_packet_again(without: dict[int, dict[str, bytes]]) -> None:
    kept: list[bytes] = []

    def answer(message: Message, task: Assignment) -> Message:
        kept.append(packet_for(message, task))
        return sends(message, task, kept[0])

    _, tracker = federation(answer)
    assert outcome(tracker, 1)["status"] == "ok"
    assert (outcome(tracker, 2)["status"], outcome(tracker, 2)["reason"]) == ("refused", "wrong_round")


def test_last_round_s_delta_and_counter_in_a_new_envelope() -> None:
    _, tracker = federation(lambda message, task: sends(message, task, packet_for(message, task, counter=1)))
    assert outcome(tracker, 1)["status"] == "ok"
    assert (outcome(tracker, 2)["status"], outcome(tracker, 2)["reason"]) == ("refused", "replayed")


def test_a_refused_update_does_not_use_up_its_counter() -> None:
    """Whoever sends nonsense under a large counter must not lock the client out."""

    def answer(message: Message, task: Assignment) -> Message:
        counter, base = (10**6, "c" * 64) if task.round_number == 1 else (2, task.base_digest)
        return sends(message, task, packet_for(message, task, counter=counter, base_digest=base))

    _, tracker = federation(answer)
    assert outcome(tracker, 1)["status"] == "refused"
    assert outcome(tracker, 2)["status"] == "ok"


class Doubled:
    """A Grid that hands out every reply twice."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for reply in self._grid.pull_messages(message_ids):
            yield from (reply, reply)


def test_replies_that_come_twice_count_once() -> None:
    plain, _ = federation(honest)
    doubled, tracker = federation(honest, wrap=Doubled)
    assert bits(doubled) == bits(plain)
    assert [event["participants"] for event in tracker.of("round")] == [4, 4]
    assert len(tracker.of("client")) == 8


# ---- claims beside a good update


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, -1e308, 1e29])
def test_a_training_loss_beyond_all_use_does_not_end_the_run(value: float) -> None:
    """A version's metrics go into its id: what is not finite could not be written."""
    plain, _ = federation(honest)

    def answer(message: Message, task: Assignment) -> Message:
        reply = honest(message, task)
        reply.content["metrics"]["train_loss"] = value
        return reply

    strategy, tracker = federation(answer)
    assert bits(strategy) == bits(plain)
    assert [event["published"] for event in tracker.of("round")] == [True, True]
    assert all(math.isfinite(event["train_loss"]) for event in tracker.of("round"))


@pytest.mark.parametrize("value", [10**400, -(10**400), [1.0, 2.0]])
def test_metrics_that_no_float_holds(value: Any) -> None:
    def answer(message: Message, task: Assignment) -> Message:
        reply = honest(message, task)
        reply.content["metrics"]["train_loss"] = value
        return reply

    _, tracker = federation(answer)
    assert outcome(tracker)["status"] == "ok"
    assert outcome(tracker)["train_loss"] is None


@pytest.mark.parametrize("count", [1e12, 1e29])
def test_a_claim_of_endless_held_out_examples(count: float, without: dict[int, dict[str, bytes]]) -> None:
    """It would be the weight of this client's own evaluation in everybody's."""

    def answer(message: Message, task: Assignment) -> Message:
        return sends(message, task, packet_for(message, task), eval_before_num_examples=count, eval_before_loss=-5.0)

    check_refused(answer, "bad_num_examples", without)


def test_a_zero_update_is_taken_and_named() -> None:
    zero = {name: torch.zeros_like(tensor) for name, tensor in delta_of(HOSTILE).items()}
    strategy, tracker = federation(lambda m, task: sends(m, task, packet_for(m, task, zero)), rounds=1)
    event = outcome(tracker)
    assert (event["status"], event["reason"], event["update_norm"]) == ("ok", "zero_update", 0.0)
    assert tracker.of("round")[0]["participants"] == 4
    # (1 + 2 + 3 + 0) / 7 / 4
    moved = strategy.server.adapter.tensors["q.factor_a"] - 0.25
    assert torch.allclose(moved, torch.tensor(6 / 28), rtol=1e-6)


def test_everybody_sends_zero() -> None:
    """Peers divide by its norm, or by the sum of weights."""
    plain = {name: torch.zeros_like(tensor) for name, tensor in delta_of(HOSTILE).items()}
    strategy, tracker = federation(
        lambda m, task: sends(m, task, packet_for(m, task, plain)), max_norm=1e-9, quorum=0.25
    )
    assert [event["published"] for event in tracker.of("round")] == [True, True]
    assert torch.equal(strategy.server.adapter.tensors["q.factor_a"], torch.full((2, 3), 0.25))


def test_an_update_beyond_the_norm_bound(without: dict[int, dict[str, bytes]]) -> None:
    large = {name: tensor * 1e6 for name, tensor in delta_of(HOSTILE).items()}
    strategy, tracker = federation(lambda m, task: sends(m, task, packet_for(m, task, large)), max_norm=100.0)
    assert bits(strategy) == without[2]
    assert outcome(tracker)["reason"] == "norm_exceeded"


def test_the_largest_float32_everywhere_is_survived() -> None:
    huge = {name: torch.full_like(tensor, 3.4e38) for name, tensor in delta_of(HOSTILE).items()}
    strategy, tracker = federation(lambda m, task: sends(m, task, packet_for(m, task, huge)), rounds=1)
    assert outcome(tracker)["status"] == "ok"
    assert all(torch.isfinite(tensor).all() for tensor in strategy.server.adapter.tensors.values())


# ---- too many of them


def test_below_the_quorum_the_version_stays_and_the_run_goes_on() -> None:
    def answer(message: Message, task: Assignment) -> Message:
        return honest(message, task) if task.round_number == 2 else raises(message, task)

    strategy, tracker = federation(answer, quorum=1.0)
    first, second = tracker.of("round")
    starts = [event["version_id"] for event in tracker.of("round_start")]
    assert (first["published"], second["published"]) == (False, True)
    assert first["version_id"] == starts[0] == starts[1] == second["parent"]
    assert "the global adapter stays as it was" in first["message"]
    assert strategy.version_id == second["version_id"] != starts[0]


def test_an_evaluation_that_is_nonsense_leaves_the_others_evaluation() -> None:
    app_answers = {"evaluated": 0}

    def spoil(grid: Any) -> Any:
        inner = grid.client_app._registered_funcs["train.default"]

        def train(message: Message, context: Context) -> Message:
            task = assignment_of(message)
            if task.plan.mode == "evaluate" and task.client_id == HOSTILE:
                app_answers["evaluated"] += 1
                return Message(reply_content(HOSTILE, "f" * 64, {"eval_before_loss": -99.0}), reply_to=message)
            reply: Message = inner(message, context)
            return reply

        grid.client_app._registered_funcs["train.default"] = train
        return grid

    _, tracker = federation(honest, wrap=spoil)
    (final,) = tracker.of("final")
    assert app_answers["evaluated"] == 1
    assert final["evaluation"] == {"loss": 1.0, "num_examples": 12.0}
    assert [refusal["reason"] for refusal in final["refused"]] == ["bad_token"]


def test_an_envelope_is_plain_data_both_ways() -> None:
    """The script above works on what a real client sends: its header is an envelope, field by field."""
    task = Assignment("run", HOSTILE, 1, "t", "p", BASE, TrainPlan(rank=2))
    content = RecordDict({"packet": ArrayRecord({"packet": packed(encode_packet({"spec": SPEC.plain}, {}))})})
    header, _, _ = decode_packet(packet_for(Message(content, 4, "train"), task))
    assert header["client_id"] == HOSTILE
    assert canonical_json(header["spec"]) == canonical_json(SPEC.plain)
