"""What travels in a message: packed bytes and plain scalars, read back exactly or refused."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from federated.config import ExperimentConfig
from federated.errors import ConfigError, DataError, WireError
from federated.flower.adapter_packets import adapter_packet, parse_adapter_packet
from federated.flower.records import (
    PACKET_STYPE,
    Assignment,
    Reply,
    assignment_of,
    config_of,
    metric_record,
    packet_of,
    query_content,
    refusal_content,
    reply_content,
    task_content,
    task_token,
)
from federated.manifest import AdapterSpec, ModuleSpec, TrainPlan, canonical_json
from federated.state import AdapterState, to_raw
from federated.wire import decode_packet, encode_packet

PLAN = TrainPlan(rank=2, trainable=("factor_b",), proximal_mu=0.5)
TASK = Assignment("run", "clinic", 3, "f" * 64, "p" * 64, "b" * 64, PLAN)
RESIDUAL = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=(ModuleSpec("q", 3, 2, 1, 1.0),))
Make = Callable[..., Any]


def message(content: RecordDict) -> Message:
    return Message(content, 7, "train")


def plain() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(canonical_json(asdict(TASK)))
    return value


class TestAssignment:
    def test_json_and_back(self):
        assert Assignment.from_json(json.dumps(plain())) == TASK

    @pytest.mark.parametrize(
        "text", ["", "5", "[]", "null", "{}", "{", '"text"', '{"plan": {}}', '{"plan": {"trainable": []}}']
    )
    def test_what_is_none_is_refused_without_repeating_it(self, text):
        with pytest.raises(WireError, match=r"^the message holds no task of this protocol: \w+$"):
            Assignment.from_json(text)

    @pytest.mark.parametrize("key", ["run_id", "client_id", "task_token", "parent_version", "base_digest"])
    @pytest.mark.parametrize("value", [None, 5, ["../x"], {}])
    def test_names_are_text(self, key, value):
        with pytest.raises(WireError):
            Assignment.from_json(json.dumps({**plain(), key: value}))

    @pytest.mark.parametrize("value", ["../../evil", "3", 3.0, True, None, -1, [3]])
    @pytest.mark.parametrize("key", ["round_number", "plan.phase", "plan.rank"])
    def test_numbers_that_end_up_in_file_names_are_whole_numbers(self, key, value):
        task = plain()
        (task["plan"] if key.startswith("plan.") else task)[key.rpartition(".")[2]] = value
        with pytest.raises(WireError):
            Assignment.from_json(json.dumps(task))

    @pytest.mark.parametrize(
        "change",
        [{"mode": "erase"}, {"mode": 1}, {"trainable": [1]}, {"kept": [1]}, {"surprise": 1},
         {"align": "dense"}, {"align_strength": 2}, {"align_strength": "1"}],
        ids=str,
    )  # fmt: skip
    def test_plans_of_another_kind_are_refused(self, change):
        task = plain()
        task["plan"] |= change
        with pytest.raises(WireError):
            Assignment.from_json(json.dumps(task))

    def test_unknown_and_missing_fields_are_refused(self):
        missing = plain()
        del missing["task_token"]
        for task in (missing, {**plain(), "surprise": 1}):
            with pytest.raises(WireError):
                Assignment.from_json(json.dumps(task))

    def test_a_message_without_one(self):
        with pytest.raises(WireError, match="expected a ConfigRecord 'task'"):
            assignment_of(message(RecordDict({"task": MetricRecord({"x": 1})})))
        with pytest.raises(WireError, match="no task of this protocol"):
            assignment_of(message(RecordDict({"task": ConfigRecord({"assignment": 5})})))


class TestToken:
    TOKEN: ClassVar[dict[str, Any]] = {"run_id": "run", "round_number": 1, "plan": TrainPlan(), "client_id": "clinic"}

    def test_is_the_same_for_the_same_task(self):
        token = task_token(b"key", **self.TOKEN)
        assert token == task_token(b"key", **self.TOKEN)
        assert len(token) == 64
        assert int(token, 16) >= 0

    @pytest.mark.parametrize(
        "change",
        [
            {"run_id": "other"},
            {"round_number": 2},
            {"client_id": "other"},
            {"plan": TrainPlan(mode="evaluate")},
            {"plan": TrainPlan(phase=2)},
        ],
        ids=str,
    )
    def test_differs_for_every_other_task(self, change):
        assert task_token(b"key", **{**self.TOKEN, **change}) != task_token(b"key", **self.TOKEN)

    def test_needs_the_key(self):
        assert task_token(b"other", **self.TOKEN) != task_token(b"key", **self.TOKEN)

    def test_fields_cannot_be_shifted_into_each_other(self):
        one = {**self.TOKEN, "run_id": "a", "client_id": "b"}
        two = {**self.TOKEN, "run_id": 'a","b', "client_id": ""}
        assert task_token(b"key", **one) != task_token(b"key", **two)


class TestAdapterPacket:
    @pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
    def test_down_and_up_bit_for_bit(self, adapter: Make, dtype: str):
        state: AdapterState = adapter(1 / 3, dtype)
        back = parse_adapter_packet(adapter_packet(state))
        assert back.spec == state.spec
        assert to_raw(back.tensors) == to_raw(state.tensors)

    @pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
    def test_zeros_can_be_left_out(self, adapter: Make, dtype: str):
        state: AdapterState = adapter(0.0, dtype)
        factor = state.tensors["q.factor_a"].clone()
        factor[1, 2] = 1 / 3
        head = {"head.weight": torch.zeros(4, 4)}
        state = replace(state, tensors={**state.tensors, **head, "q.factor_a": factor}, extra={"more": torch.ones(2)})
        packet = adapter_packet(state, sparse=True)
        back = parse_adapter_packet(packet)
        assert to_raw(back.tensors) == to_raw(state.tensors)
        assert back.extra.keys() == {"more"}
        _, raw, _ = decode_packet(packet)
        assert raw["sparse:values"].shape == (5,)  # one third, and four times -0.0

    def test_a_large_sparse_adapter_is_small_on_the_wire(self):
        spec = AdapterSpec("lora", 8, 8.0, use_rslora=False, modules=(ModuleSpec("q", 512, 512, 8, 8.0),))
        tensors = {"q.factor_a": torch.zeros(8, 512), "q.factor_b": torch.zeros(512, 8)}
        tensors["q.factor_b"][::4] = 1.0
        state = AdapterState(spec, tensors)
        assert len(adapter_packet(state, sparse=True)) < 0.2 * len(adapter_packet(state))

    @pytest.mark.parametrize(
        "spec",
        [
            {"d_in": 2**40},
            {"rank": 0},
            {"d_out": -3},
            {"d_in": "many"},
            {"d_in": 2.5},
        ],
        ids=str,
    )
    def test_a_sparse_adapter_of_impossible_size_is_refused_before_it_is_made(self, adapter: Make, spec: Any):
        header, raw, _ = decode_packet(adapter_packet(adapter(), sparse=True))
        header["spec"]["modules"][0] |= spec
        with pytest.raises(WireError, match="sizes that no adapter of this protocol has"):
            parse_adapter_packet(encode_packet(header, raw))

    def test_a_sparse_adapter_without_its_values_is_refused(self, adapter: Make):
        header, raw, _ = decode_packet(adapter_packet(adapter(), sparse=True))
        for name in raw:
            with pytest.raises(WireError, match="the sparse values or their positions are missing"):
                parse_adapter_packet(encode_packet(header, {key: one for key, one in raw.items() if key != name}))

    def test_a_residual_and_what_is_extra_travel_beside_it(self, adapter: Make):
        beside = AdapterState(RESIDUAL, {"q.factor_a": torch.full((1, 3), 1 / 7), "q.factor_b": torch.ones(2, 1)})
        extra = {"control:q.factor_a": torch.ones(2, 3), "seen": torch.arange(3)}
        sent = replace(adapter(1 / 3, "BF16"), residual=beside, extra=extra)
        back = parse_adapter_packet(adapter_packet(sent))
        assert back.residual is not None
        assert (back.spec, back.residual.spec) == (sent.spec, RESIDUAL)
        for found, expected in (
            (back.tensors, sent.tensors), (back.residual.tensors, beside.tensors), (back.extra, extra)
        ):  # fmt: skip
            assert to_raw(found) == to_raw(expected)
        bare = parse_adapter_packet(adapter_packet(adapter()))
        assert (bare.residual, bare.extra) == (None, {})

    def test_tensors_of_a_residual_without_its_spec_are_refused(self, adapter: Make):
        header = {"kind": "adapter", "spec": adapter().spec.plain}
        tensors = {**adapter().tensors, "residual:q.factor_a": torch.ones(1, 3)}
        with pytest.raises(WireError, match="tensors of a residual, and no spec of one"):
            parse_adapter_packet(encode_packet(header, to_raw(tensors)))

    def test_a_spec_of_a_residual_without_its_tensors_is_refused(self, adapter: Make):
        header = {"kind": "adapter", "spec": adapter().spec.plain, "residual": RESIDUAL.plain}
        for tensors in ({}, {"residual:q.factor_a": torch.ones(1, 3)}):
            with pytest.raises(WireError, match=r"residual's spec, and not its tensors: missing \['q\.factor_"):
                parse_adapter_packet(encode_packet(header, to_raw({**adapter().tensors, **tensors})))

    @pytest.mark.parametrize("spec", [5, [], "text", {}, {"modules": 5}, {"modules": [5]}, None], ids=str)
    def test_a_residual_s_spec_of_another_shape_is_refused(self, adapter: Make, spec: Any):
        header = {"kind": "adapter", "spec": adapter().spec.plain, "residual": spec}
        with pytest.raises(WireError, match=r"^the packet holds no adapter: \w+$"):
            parse_adapter_packet(encode_packet(header, to_raw(adapter().tensors)))

    @pytest.mark.parametrize("spec", [None, 5, [], "text", {}, {"modules": 5}, {"modules": [5]}, [[1, 2], [3, 4]]])
    def test_a_packet_without_an_adapter_is_refused(self, adapter: Make, spec: Any):
        packet = encode_packet({"kind": "adapter", "spec": spec}, to_raw(adapter().tensors))
        with pytest.raises(WireError, match=r"^the packet holds no adapter: \w+$"):
            parse_adapter_packet(packet)
        with pytest.raises(WireError, match="KeyError"):
            parse_adapter_packet(encode_packet({}, {}))

    def test_bytes_that_are_no_packet(self):
        with pytest.raises(WireError):
            parse_adapter_packet(b"garbage")


class TestPacketOf:
    def test_bytes_come_back(self):
        assert packet_of(reply_content("clinic", "t", {}, b"\x00packed")) == b"\x00packed"

    @pytest.mark.parametrize(
        "record",
        [
            None,
            ConfigRecord({"packet": b"bytes"}),
            MetricRecord({"packet": 1}),
            ArrayRecord({}),
            ArrayRecord({"other": Array(dtype="uint8", shape=(1,), stype=PACKET_STYPE, data=b"x")}),
            ArrayRecord(
                {name: Array(dtype="uint8", shape=(1,), stype=PACKET_STYPE, data=b"x") for name in ("packet", "more")}
            ),
        ],
        ids=["missing", "config", "metrics", "empty", "other name", "two arrays"],
    )
    def test_anything_else_is_refused(self, record: Any):
        content = RecordDict({"packet": record} if record is not None else {})
        with pytest.raises(WireError, match="expected one ArrayRecord 'packet' with one Array"):
            packet_of(content)

    def test_an_array_that_flower_would_unpickle_or_parse_is_refused(self):
        content = RecordDict({"packet": ArrayRecord({"packet": Array(torch.zeros(2).numpy())})})
        with pytest.raises(WireError, match=r"serialisation type 'numpy\.ndarray', expected 'fedpeft\.packet'"):
            packet_of(content)

    def test_a_long_serialisation_type_is_cut(self):
        array = Array(dtype="uint8", shape=(1,), stype="x" * 5000, data=b"x")
        with pytest.raises(WireError) as caught:
            packet_of(RecordDict({"packet": ArrayRecord({"packet": array})}))
        assert len(str(caught.value)) < 200


class TestTask:
    def test_a_task_holds_assignment_experiment_and_packet(self, config: Make):
        sent: ExperimentConfig = config(
            run_dir="/srv/secret", registry="sqlite:////srv/registry", registry_blobs="/srv/blobs"
        )
        received = message(task_content(TASK, sent, b"packed"))
        assert assignment_of(received) == TASK
        assert packet_of(received.content) == b"packed"
        assert config_of(received) == sent.for_clients()
        assert "/srv" not in str(received.content)

    def test_a_query_holds_the_experiment_only(self, config: Make):
        content = query_content(config())
        assert list(content) == ["task"]
        assert config_of(message(content)) == config().for_clients()

    @pytest.mark.parametrize(
        "content",
        [{}, {"task": ConfigRecord({})}, {"task": ConfigRecord({"experiment": 5})}, {"task": MetricRecord({})}],
    )
    def test_a_message_without_an_experiment(self, content: dict[str, Any]):
        with pytest.raises(WireError, match="the message holds no experiment"):
            config_of(message(RecordDict(content)))

    def test_an_experiment_is_checked_again_on_arrival(self):
        content = RecordDict({"task": ConfigRecord({"experiment": '{"_target_": "os.system"}'})})
        with pytest.raises(ConfigError, match=r"_target_ = 'os\.system': unknown key"):
            config_of(message(content))


class TestReply:
    def test_is_read_back(self):
        reply = Reply.from_message(message(reply_content("clinic", "token", {"loss": 0.5, "steps": 3}, b"packed")))
        assert reply == Reply("clinic", "token", {"loss": 0.5, "steps": 3.0}, b"packed")

    def test_without_a_packet(self):
        assert Reply.from_message(message(reply_content("clinic", "token", {}))).packet is None

    @pytest.mark.parametrize("content", [{}, {"reply": MetricRecord({"client_id": 1})}, {"metrics": MetricRecord({})}])
    def test_without_a_head_is_refused(self, content: dict[str, Any]):
        with pytest.raises(WireError, match="no 'reply' record"):
            Reply.from_message(message(RecordDict(content)))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, [1.0, 2.0]])
    def test_metrics_that_are_no_measurement_are_left_out(self, value: Any):
        content = reply_content("clinic", "token", {"loss": 0.5})
        content["metrics"]["odd"] = value
        assert Reply.from_message(message(content)).metrics == {"loss": 0.5}

    def test_metrics_of_another_record_type_are_no_metrics(self):
        content = reply_content("clinic", "token", {})
        content["metrics"] = ConfigRecord({"loss": 0.5})
        assert Reply.from_message(message(content)).metrics == {}

    def test_a_head_of_other_types_becomes_text(self):
        reply = Reply.from_message(message(RecordDict({"reply": ConfigRecord({"client_id": 5, "reason": 1.5})})))
        assert (reply.client_id, reply.reason, reply.task_token) == ("5", "1.5", "")

    def test_a_long_message_is_cut(self):
        reply = Reply.from_message(message(RecordDict({"reply": ConfigRecord({"message": "x" * 10_000})})))
        assert len(reply.message or "") == 500


class TestMetricRecord:
    def test_only_finite_numbers_travel_as_floats(self):
        record = metric_record({"a": 1, "b": 2.5, "c": math.nan, "d": math.inf})
        assert dict(record) == {"a": 1.0, "b": 2.5}
        assert all(type(value) is float for value in record.values())


QUOTED = "patient Jane Doe has diabetes"


class TestRefusal:
    def test_our_own_error_is_said_in_full(self):
        reply = Reply.from_message(message(refusal_content("clinic", DataError("no rows; add some"))))
        assert (reply.reason, reply.message, reply.client_id) == ("DataError", "no rows; add some", "clinic")
        assert reply.packet is None

    @pytest.mark.parametrize(
        "error",
        [
            ValueError(QUOTED),
            KeyError(QUOTED),
            UnicodeDecodeError("utf-8", QUOTED.encode(), 0, 1, QUOTED),
            RuntimeError(QUOTED, {"row": QUOTED}),
            type("Odd", (Exception,), {"__str__": lambda self: QUOTED})(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_nothing_of_a_foreign_error_but_its_type_leaves(self, error: Exception):
        content = refusal_content("clinic", error)
        assert "Jane" not in str(content)
        assert content["reply"]["reason"] == type(error).__name__

    def test_a_foreign_cause_stays_here_too(self):
        try:
            try:
                raise ValueError(QUOTED)
            except ValueError as cause:
                raise DataError("row 3 is malformed") from cause
        except DataError as error:
            assert "Jane" not in str(refusal_content("clinic", error))

    def test_plans_are_compared_by_digest(self):
        assert replace(PLAN, rank=3).digest != PLAN.digest
