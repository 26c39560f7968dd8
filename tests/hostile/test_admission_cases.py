"""The reference list of hostile updates: 50 bad packets, 3 good ones, and 12 faults of the whole system.

Each bad packet comes from an enrolled device that signs what it sends, unless its signature is the fault: so every
layer behind the signature is reached. ``theirs`` is the code of the reference gate that the list was written for,
``ours`` is the one that a client is told here. The system's cases are here, or named with the test that holds them.
"""

import ast
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from federated.aggregation import ClientView, FlexLoRA, make_rule
from federated.config import experiment_from
from federated.delta import Update, norm
from federated.errors import UpdateRejected
from federated.flower import DeltaStrategy, InProcessGrid
from federated.flower.adapter_packets import parse_adapter_packet
from federated.flower.enrolled_nodes import EnrolledNodes
from federated.flower.node_keys import openssh_line
from federated.flower.records import Assignment, assignment_of, packet_of, reply_content
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, Envelope, ModuleSpec, RawTensor, canonical_json, layout_of, sha256_hex
from federated.privacy.client_level import clip
from federated.state import AdapterState, from_raw, to_raw
from federated.testing import in_another_basis
from federated.tracking import MemoryTracker
from federated.wire import Expectation, Limits, admit, encode_tensors, seal_update
from federated.wire.codec import join_packet
from federated.wire.signing import sign_envelope

TESTS = Path(__file__).resolve().parents[1]
KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
SPEC = AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=(ModuleSpec("q", 3, 2, 2, 4.0),))
A, B = "q.factor_a", "q.factor_b"
TENSORS = {
    A: RawTensor.from_array(np.array([[0.5, -1.0, 2.0], [0.0, 0.25, 1.0]], "<f4")),
    B: RawTensor.from_array(np.array([[1.0, 0.0], [0.5, -1.0]], "<f4")),
}
LIMITS = Limits(max_bytes=16 * 2**20, max_norm=1000.0)
EXPECTED = Expectation(
    "run", 4, 1, "clinic", "token", "v" * 64, "b" * 64, SPEC, "p" * 64,
    max_examples=1000, last_counter=3, update_key=KEY.public_key().public_bytes_raw(),
)  # fmt: skip


def envelope(payload: bytes, tensors: Mapping[str, RawTensor] = TENSORS, **changes: Any) -> Envelope:
    fields: dict[str, Any] = {
        "run_id": "run", "client_id": "clinic", "round_number": 4, "phase": 1, "task_token": "token", "counter": 4,
        "parent_version": "v" * 64, "base_digest": "b" * 64, "spec": SPEC, "plan_digest": "p" * 64, "num_examples": 10,
        "layout": layout_of(tensors), "payload_digest": sha256_hex(payload),
    }  # fmt: skip
    return Envelope(**{**fields, **changes})


def packet(payload: bytes | None = None, *, key: Ed25519PrivateKey = KEY, **changes: Any) -> bytes:
    """The right packet, signed, or one with another payload or other fields; its digest and signature fit."""
    found = encode_tensors(TENSORS) if payload is None else payload
    return join_packet(sign_envelope(envelope(found, **changes), key).to_dict(), found)


def sending(tensors: Mapping[str, RawTensor], **changes: Any) -> bytes:
    """A packet of other tensors, all of it consistent."""
    return packet(encode_tensors(tensors), layout=layout_of(tensors), **changes)


def with_header(text: bytes | None = None, *, drop: str = "", **fields: Any) -> bytes:
    """The right packet with fields of its header added, replaced or dropped, or another text in its place."""
    payload = encode_tensors(TENSORS)
    header = sign_envelope(envelope(payload), KEY).to_dict() | fields
    header.pop(drop, None)
    encoded = canonical_json(header) if text is None else text
    return struct.pack("<4sHI", b"FPFT", 1, len(encoded)) + encoded + payload


def entry(name: str = A, begin: int = 0, end: int = 24, **changes: Any) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end], **changes}}


def raw(header: Any, body: bytes = bytes(40), *, length: int | None = None) -> bytes:
    """A payload that is no canonical file: its header as given."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + body


GOOD = encode_tensors(TENSORS)
FACTOR_B = entry(B, 24, 40, shape=[2, 2])


def changed(name: str, value: Any, dtype: str = "<f4") -> dict[str, RawTensor]:
    return {**TENSORS, name: RawTensor.from_array(np.asarray(value, dtype))}


def filled(value: float) -> dict[str, RawTensor]:
    return {name: RawTensor.from_array(np.full(one.shape, value, "<f4")) for name, one in TENSORS.items()}


class Case(NamedTuple):
    """A bad packet: the reference's code and ours; ``after`` is the client's last counter."""

    theirs: str
    ours: str
    data: bytes
    after: int = 3


duplicated = b"{" + json.dumps(entry())[1:-1].encode() + b"," + json.dumps(entry())[1:-1].encode() + b"}"
nan = TENSORS[A].array.copy()
nan[1, 1] = np.nan
infinite = TENSORS[A].array.copy()
infinite[0, 2] = -np.inf
CASES: dict[str, Case] = {
    "1 empty payload": Case("TRUNCATED", "bad_encoding", packet(b"")),
    "2 seven bytes": Case("TRUNCATED", "bad_encoding", packet(bytes(7))),
    "3 header length 2^63": Case("HEADER_SIZE", "bad_encoding", packet(struct.pack("<Q", 2**63) + GOOD[8:])),
    "4 header beyond the file": Case("HEADER_SIZE", "bad_encoding", packet(raw(entry(), b"", length=4096))),
    "5 header of 2 MiB": Case("HEADER_SIZE", "too_large", packet(raw(b" " * 2**21))),
    "6 JSON that is not UTF-8": Case("JSON", "bad_encoding", packet(raw(b'{"\xff":{}}'))),
    "7 header is a list": Case("HEADER_TYPE", "bad_encoding", packet(raw(b"[]"))),
    "8 100 000 nested brackets": Case("JSON", "bad_encoding", packet(raw(b"[" * 100_000))),
    "9 duplicate key": Case("DUP_KEY", "bad_encoding", packet(raw(duplicated, bytes(24)))),
    "10 a weight of the base besides": Case(
        "UNEXPECTED_TENSOR", "layout_mismatch", sending({**TENSORS, "q.base_layer.weight": TENSORS[A]})
    ),
    "11 ../../etc/passwd": Case(
        "UNEXPECTED_TENSOR", "bad_encoding", packet(raw({**entry("../../etc/passwd"), **FACTOR_B}))
    ),
    "12 empty name": Case("UNEXPECTED_TENSOR", "bad_encoding", packet(raw({**entry(""), **FACTOR_B}))),
    "13 a missing tensor": Case("MISSING_TENSOR", "layout_mismatch", sending({A: TENSORS[A]})),
    "14 another rank": Case("SHAPE", "layout_mismatch", sending(changed(A, np.ones((4, 3))))),
    "15 a shape that broadcasts": Case("SHAPE", "layout_mismatch", sending(changed(A, np.ones((1, 3))))),
    "16 transposed": Case("SHAPE", "layout_mismatch", sending(changed(A, np.ones((3, 2))))),
    "17 a float in a shape": Case("SHAPE", "bad_encoding", packet(raw({**entry(shape=[2.0, 3]), **FACTOR_B}))),
    "18 I64": Case("DTYPE", "layout_mismatch", sending(changed(A, np.ones((2, 3)), "<i8"))),
    "19 F4": Case("DTYPE", "bad_encoding", packet(raw({**entry(dtype="F4"), **FACTOR_B}))),
    "20 overlap": Case("OFFSETS", "bad_encoding", packet(raw({**entry(), **entry(B, 8, 24, shape=[2, 2])}))),
    "21 gap": Case("OFFSETS", "bad_encoding", packet(raw({**entry(), **entry(B, 32, 48, shape=[2, 2])}, bytes(48)))),
    "22 negative offset": Case("OFFSETS", "bad_encoding", packet(raw({**entry(begin=-24, end=0), **FACTOR_B}))),
    "23 a second file behind it": Case("TRAILING", "bad_encoding", packet(GOOD + b"PK\x03\x04")),
    "24 body cut short": Case("OFFSETS", "bad_encoding", packet(GOOD[:-1])),
    "25 NaN": Case("NON_FINITE", "not_finite", sending(changed(A, nan))),
    "26 infinity": Case("NON_FINITE", "not_finite", sending(changed(A, infinite))),
    "27 1e30": Case("NORM", "norm_exceeded", sending(filled(1e30))),
    "28 norm 10 000": Case("NORM", "norm_exceeded", sending(filled(1e4 / 10**0.5))),
    "29 more bytes than allowed": Case("TOO_LARGE", "too_large", packet(bytes(17 * 2**20))),
    "30 a pickle": Case("HEADER_SIZE", "bad_encoding", packet(b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94.")),
    "31 payload swapped after signing": Case(
        "HASH", "payload_digest_mismatch", packet()[: -len(GOOD)] + encode_tensors(filled(1.0))
    ),
    "32 another client's signature": Case("BAD_SIGNATURE", "bad_signature", packet(key=OTHER)),
    "33 empty signature": Case("BAD_SIGNATURE", "bad_signature", with_header(signature="")),
    "33 no signature": Case("BAD_SIGNATURE", "unsigned", with_header(signature=None)),
    "34 a name that nobody enrolled": Case("UNKNOWN_CLIENT", "wrong_client", packet(client_id="sybil", key=OTHER)),
    "35 ../../root for a name": Case("UNKNOWN_CLIENT", "wrong_client", packet(client_id="../../root")),
    "36 a second delta": Case("REPLAY", "replayed", packet(), after=4),
    "37 last round's delta": Case("WRONG_ROUND", "wrong_round", packet(round_number=3)),
    "38 an older version's": Case("STALE_BASE", "wrong_parent", packet(parent_version="u" * 64)),
    "39 another run's": Case("WRONG_RUN", "wrong_run", packet(run_id="other")),
    "40 not sampled": Case("NOT_SAMPLED", "bad_token", packet(task_token="another")),  # noqa: S106
    "41 10^12 examples": Case("NUM_EXAMPLES", "bad_num_examples", packet(num_examples=10**12)),
    "42 no example": Case("NUM_EXAMPLES", "bad_num_examples", packet(num_examples=0)),
    "43 -5 examples": Case("NUM_EXAMPLES", "bad_num_examples", packet(num_examples=-5)),
    "44 true examples": Case("ENV_TYPES", "bad_envelope", with_header(num_examples=True)),
    "44 1.5 examples": Case("ENV_TYPES", "bad_envelope", with_header(num_examples=1.5)),
    "45 NaN in the envelope": Case("JSON", "bad_encoding", with_header(b'{"num_examples":NaN}')),
    "46 a field too many": Case("ENV_FIELDS", "bad_envelope", with_header(admin=True)),
    "47 a field too few": Case("ENV_FIELDS", "bad_envelope", with_header(drop="counter")),
    "48 version 2": Case("ENV_VERSION", "wrong_protocol", with_header(protocol_version=2)),
    "49 an envelope of 100 KB": Case("ENV_SIZE", "bad_envelope", with_header(padding="x" * 100_000)),
    "49 an envelope beyond the limit": Case("ENV_SIZE", "bad_encoding", with_header(padding="x" * 2**20)),
    "50 a field of an entry too many": Case(
        "ENTRY_FIELDS", "bad_encoding", packet(raw({**entry(note="x"), **FACTOR_B}))
    ),
}


def number(name: str) -> int:
    return int(name.partition(" ")[0])


def test_the_list_is_whole() -> None:
    assert sorted({number(name) for name in CASES}) == list(range(1, 51))
    assert sorted({number(name) for name in SYSTEM}) == list(range(51, 63))


@pytest.mark.parametrize("name", CASES)
def test_a_bad_packet_is_refused_by_its_code(name: str) -> None:
    case = CASES[name]
    with pytest.raises(UpdateRejected) as caught:
        admit(case.data, replace(EXPECTED, last_counter=case.after), layout=layout_of(TENSORS), limits=LIMITS)
    assert (caught.value.reason, caught.value.client_id) == (case.ours, "clinic")
    assert str(caught.value).isprintable()


class TestNamesThatAreNobodys:
    """34 and 35 once more, where they are met first: a node under such a name is in no round."""

    class Nodes:
        """One node with a key of its own."""

        def __init__(self) -> None:
            self.key = public_key_to_bytes(generate_key_pairs()[1])

        def get_node_ids(self) -> list[int]:
            return [1]

        def get_nodes(self) -> list[NodeInfo]:
            return [NodeInfo(node_id=1, public_key=self.key)]

    @pytest.fixture
    def grid(self) -> Nodes:
        return self.Nodes()

    def enrolled(self, folder: Path, node_key: str) -> EnrolledNodes:
        one = {"state": "approved", "node_key": node_key, "update_key": "A" * 43 + "="}
        (folder / "devices.json").write_text(json.dumps({"format": 1, "devices": {"clinic": one}}))
        return EnrolledNodes(str(folder / "devices.json"))

    def test_a_node_that_nobody_enrolled(self, grid: Any, tmp_path: Path):
        nodes = self.enrolled(tmp_path, openssh_line(public_key_to_bytes(generate_key_pairs()[1])))
        nodes.look(grid)
        assert [fault.reason for fault in (nodes.stranger(1), nodes.fault("sybil", 1)) if fault] == [
            "unknown_client"
        ] * 2

    @pytest.mark.parametrize(("name", "reason"), [("../../root", "unknown_client"), ("clinic", None)])
    def test_a_name_that_nobody_has(self, grid: Any, tmp_path: Path, name: str, reason: str | None):
        nodes = self.enrolled(tmp_path, openssh_line(grid.key))
        nodes.look(grid)
        fault = nodes.fault(name, 1)
        assert (fault and fault.reason) == reason


class TestGood:
    """What must be let in."""

    def admitted(self, tensors: Mapping[str, RawTensor]) -> Any:
        return admit(sending(tensors), EXPECTED, layout=layout_of(TENSORS), limits=LIMITS)

    def test_a_delta_of_zeros(self):
        assert self.admitted(filled(0.0)).norm == 0.0

    def test_a_delta_beyond_the_clipping_norm_which_is_clipped_to_exactly_that(self):
        update = from_raw(self.admitted(filled(100.0)).tensors)
        assert norm(update) > 1.0
        assert norm(clip(update, 1.0).tensors) == pytest.approx(1.0, rel=1e-12)

    def test_tensors_in_any_order(self):
        assert sending(dict(reversed(TENSORS.items()))) == sending(TENSORS)
        assert self.admitted(dict(reversed(TENSORS.items()))).tensors == TENSORS


# ---- the system's cases


HERE = "hostile/test_admission_cases.py"
SYSTEM: dict[str, tuple[str, str]] = {
    "51 key order permuted under DP clip": (HERE, "test_51_the_order_of_keys_changes_nothing_under_clipping"),
    "51 in the noisy sum": (
        "unit/privacy/test_client_level.py",
        "test_the_order_of_names_does_not_matter_and_nothing_is_changed_in_place",
    ),
    "52 client dies mid-upload": (HERE, "test_52_of_an_upload_that_breaks_off_nothing_is_taken"),
    "52 its process dies": ("hostile/test_flower_hostile_clients.py", "test_a_client_whose_process_dies"),
    "53 all clients refused": (HERE, "test_53_when_all_are_refused_the_version_stays_and_the_round_is_marked"),
    "54 3 of 10 reply: refused": (HERE, "test_54_three_of_ten_are_no_round"),
    "54 noise stays as planned": (
        "unit/flower/test_flower_private.py",
        "test_who_is_missing_leaves_noise_and_divisor_as_planned",
    ),
    "55 to 57 gauges": (HERE, "test_55_56_57_another_basis_is_the_same_update"),
    "55 every rule": ("unit/aggregation/test_aggregation_gauge.py", "test_an_immune_rule_s_result_is_the_same"),
    "56 rules that fix a basis": (
        "unit/aggregation/test_aggregation_gauge.py",
        "test_a_refusing_rule_has_no_place_for_another_basis",
    ),
    "57 rules that are exposed": (
        "unit/aggregation/test_aggregation_gauge.py",
        "test_an_exposed_rule_says_so_and_still_gives_something_finite",
    ),
    "58 colluding clients": (HERE, "test_58_two_of_seven_that_send_the_same_do_not_decide"),
    "58 every robust rule": (
        "unit/aggregation/test_aggregation_adversaries.py",
        "test_up_to_f_hostile_clients_of_any_kind_are_withstood",
    ),
    "59 registry tampered": ("hostile/test_registry_tampering.py", "test_the_log_names_the_row_that_was_tampered_with"),
    "59 weights tampered": ("hostile/test_registry_tampering.py", "test_changed_weights_never_come_out"),
    "59 ledger tampered": ("unit/privacy/test_ledger.py", "test_damage_is_named_with_its_line"),
    "60 killed while charging": ("unit/privacy/test_ledger.py", "test_killed_at"),
    "60 the server's ledger": ("unit/privacy/test_server_budget.py", "test_what_was_spent_counts_in_the_next_process"),
    "60 the client's answer": ("unit/flower/test_flower_client.py", "TestSentAgain::test_it_is_not_computed_twice"),
    "61 no TLS and no flag": (HERE, "test_61_a_server_without_tls_needs_to_be_told_so"),
    "62 seed and noise of clients": ("unit/flower/test_flower_private.py", "test_no_config_seed_touches_the_noise"),
    "62 seed and noise of examples": (
        "unit/flower/test_flower_client_privacy.py",
        "test_one_seed_gives_other_noise_each_time_and_a_test_seed_is_stamped",
    ),
}
"""Number and case to the file and the test that holds it."""


@pytest.mark.parametrize("case", SYSTEM)
def test_the_test_that_is_named_is_there(case: str) -> None:
    place, name = SYSTEM[case]
    *classes, function = name.split("::")
    body: list[ast.stmt] = ast.parse((TESTS / place).read_text(encoding="utf-8")).body
    for one in classes:
        (body,) = [node.body for node in body if isinstance(node, ast.ClassDef) and node.name == one]
    assert function in [node.name for node in body if isinstance(node, ast.FunctionDef)]


def test_every_test_of_the_system_s_cases_is_named() -> None:
    written = re.findall(r"^def (test_\d\d_\w+)", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(written) == {name for place, name in SYSTEM.values() if place == HERE}


def test_51_the_order_of_keys_changes_nothing_under_clipping() -> None:
    found = [
        clip(from_raw(admit(sent, EXPECTED, layout=layout_of(TENSORS)).tensors), 0.5).tensors
        for sent in (sending(TENSORS), sending(dict(reversed(TENSORS.items()))))
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in (A, B))
    assert norm(found[0]) == pytest.approx(0.5, rel=1e-12)


def test_52_of_an_upload_that_breaks_off_nothing_is_taken() -> None:
    whole = packet()
    for end in range(len(whole)):
        with pytest.raises(UpdateRejected) as caught:
            admit(whole[:end], EXPECTED, layout=layout_of(TENSORS), limits=LIMITS)
        assert caught.value.reason in ("bad_encoding", "payload_digest_mismatch")


Answer = Callable[[Message, Assignment], Message]


@dataclass
class Played:
    """What a federation of fake clients left."""

    strategy: DeltaStrategy
    tracker: MemoryTracker

    @property
    def tensors(self) -> dict[str, list[Any]]:
        return {name: tensor.tolist() for name, tensor in self.strategy.server.adapter.tensors.items()}

    @property
    def product(self) -> float:
        """One entry of B A; all are equal."""
        tensors = self.strategy.server.adapter.tensors
        return float((tensors[B] @ tensors[A])[0, 0])


def fields_of(task: Assignment, message: Message) -> dict[str, Any]:
    return {
        "run_id": task.run_id, "client_id": task.client_id, "round_number": task.round_number,
        "phase": task.plan.phase, "task_token": task.task_token, "counter": task.round_number,
        "parent_version": task.parent_version, "base_digest": task.base_digest, "plan_digest": task.plan.digest,
        "spec": parse_adapter_packet(packet_of(message.content)).spec, "num_examples": 10,
    }  # fmt: skip


def trained(value: float) -> Answer:
    """A client whose delta is that everywhere."""

    def answer(message: Message, task: Assignment) -> Message:
        delta = {A: torch.full((2, 3), value), B: torch.full((2, 2), value)}
        sent = seal_update(to_raw(delta), **fields_of(task, message)) if task.plan.mode == "train" else None
        return Message(reply_content(task.client_id, task.task_token, {}, sent), reply_to=message)

    return answer


def useless(message: Message, _: Assignment) -> Message:
    return Message(RecordDict(), reply_to=message)


def play(clients: list[Answer], **config: Any) -> Played:
    """Run a federation in this process."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(reply_content(f"client-{context.node_config['partition-id']:03d}", "", {}), reply_to=message)

    @app.train()
    def train(message: Message, _: Context) -> Message:
        task = assignment_of(message)
        return clients[int(task.client_id[-3:])](message, task)

    experiment = experiment_from({"task": {"labels": ["a", "b"]}, "rounds": 1, **config})
    initial = AdapterState(SPEC, {A: torch.full((2, 3), 0.25), B: torch.full((2, 2), 0.25)})
    tracker = MemoryTracker(clock=lambda: 0.0)
    strategy = DeltaStrategy(experiment, initial=initial, base_digest="b" * 64, tracker=tracker, run_id="run")
    with InProcessGrid(app, len(clients)) as grid:
        strategy.start(grid)
    return Played(strategy, tracker)


@pytest.fixture
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_run_id": 1, "_node_id": 0, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.mark.usefixtures("_identity")
def test_53_when_all_are_refused_the_version_stays_and_the_round_is_marked() -> None:
    played = play([useless] * 3)
    (event,) = played.tracker.of("round")
    assert (event["published"], event["participants"]) == (False, 0)
    assert "the global adapter stays as it was" in event["message"]
    assert [one["reason"] for one in event["refused"]] == ["bad_encoding"] * 3
    assert event["version_id"] == played.tracker.of("round_start")[0]["version_id"]
    assert played.tensors == {A: [[0.25] * 3] * 2, B: [[0.25] * 2] * 2}


@pytest.mark.usefixtures("_identity")
def test_54_three_of_ten_are_no_round() -> None:
    few = play([trained(1.0)] * 3 + [useless] * 7)
    assert not few.tracker.of("round")[0]["published"]
    assert few.tensors[A][0][0] == 0.25
    enough = play([trained(1.0)] * 5 + [useless] * 5)
    assert enough.tracker.of("round")[0]["published"]
    assert enough.tensors[A][0][0] == 1.25


GAUGES = {
    "55 flip": lambda rank: -torch.eye(rank, dtype=torch.float64),
    "56 rotation": lambda rank: torch.linalg.qr(torch.arange(1.0, 1 + rank**2, dtype=torch.float64).view(rank, rank)).Q,
    "57 c = 10 000": lambda rank: torch.eye(rank, dtype=torch.float64) / 1e4,
}


@pytest.mark.parametrize("gauge", GAUGES)
def test_55_56_57_another_basis_is_the_same_update(gauge: str) -> None:
    """Of the hostile client's products nothing changes; a rule on factors has to say that it is exposed."""
    received = AdapterState(SPEC, {A: torch.full((2, 3), 0.25), B: torch.full((2, 2), 0.25)})
    deltas = {"honest": from_raw(TENSORS), "hostile": from_raw(filled(0.5))}
    made = []
    for moved in (deltas, {**deltas, "hostile": in_another_basis(received, deltas["hostile"], GAUGES[gauge])}):
        rule, state = FlexLoRA(), GlobalState(received, rule_state=FlexLoRA().init(SPEC))
        rule.plan(state, ClientView("hostile"), 1)
        accumulator = rule.start(state, 1)
        for client_id, delta in moved.items():
            accumulator.add(Update(client_id, delta, 1, received=received), 1.0)
        adapter = accumulator.finish().state.adapter  # type: ignore[union-attr]
        made.append(adapter.tensors[B].double() @ adapter.tensors[A].double())
    torch.testing.assert_close(made[0], made[1], rtol=2e-3, atol=2e-3)
    assert {name: make_rule(name).properties.gauge for name in ("flexlora", "fedit", "ffa")} == {
        "flexlora": "immune", "fedit": "exposed", "ffa": "refused"
    }  # fmt: skip


@pytest.mark.usefixtures("_identity")
def test_58_two_of_seven_that_send_the_same_do_not_decide() -> None:
    """Two equal ones are each other's nearest, and look like a crowd."""
    honest = [trained(1.0 + step / 100) for step in range(5)]
    strategy = {"rule": "krum", "options": {"byzantine": 2}, "weighted": False}
    made = play([*honest, trained(-50.0), trained(-50.0)], strategy=strategy)
    assert 2 * 1.25**2 - 1e-4 <= made.product <= 2 * 1.29**2 + 1e-4
    assert play([*honest, trained(-50.0), trained(-50.0)]).product > 300


@pytest.mark.slow
def test_61_a_server_without_tls_needs_to_be_told_so(tmp_path: Path) -> None:
    """Flower's own server, which every deployment of ours starts."""
    command = [Path(sys.executable).parent / "flower-superlink", "--host", "127.0.0.1", "--port", "18080"]
    environment = {"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "Certificates are required unless running in insecure mode" in done.stdout + done.stderr
