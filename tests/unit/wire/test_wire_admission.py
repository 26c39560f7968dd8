"""From bytes to an admitted update, and the table of reasons."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import federated.wire
from federated.errors import UpdateRejected, WireError
from federated.manifest import RawTensor, TensorLayout, canonical_json
from federated.wire import REASONS, Expectation, Limits, admit, decode_packet, encode_packet, encode_tensors
from federated.wire.codec import join_packet
from federated.wire.reasons import refused

Seal = Callable[..., bytes]
Tensors = dict[str, RawTensor]
ROOM = Path(federated.wire.__file__).parent
DOCUMENT = ROOM.parents[1] / "docs" / "wire-format.md"


def refusal(data: bytes, expected: Expectation, layout: TensorLayout, **limits: Any) -> UpdateRejected:
    with pytest.raises(UpdateRejected) as caught:
        admit(data, expected, layout=layout, limits=Limits(**limits))
    return caught.value


def with_header(packet: bytes, **changes: Any) -> bytes:
    header, tensors, _ = decode_packet(packet)
    return encode_packet({**header, **changes}, tensors)


def test_an_honest_update_is_admitted_with_its_tensors(
    seal: Seal, expected: Expectation, layout: TensorLayout, tensors: Tensors
) -> None:
    assert admit(seal(), expected, layout=layout).tensors == tensors


def test_an_admitted_update_says_who_sent_it(seal: Seal, expected: Expectation, layout: TensorLayout) -> None:
    assert admit(seal(), expected, layout=layout).envelope.client_id == "clinic"


def test_an_admitted_update_says_its_norm(seal: Seal, expected: Expectation, layout: TensorLayout) -> None:
    assert admit(seal(), expected, layout=layout).norm == pytest.approx(10.5**0.5, rel=1e-15)


def test_an_update_that_changes_nothing_is_admitted_with_norm_zero(
    seal: Seal, expected: Expectation, layout: TensorLayout, tensors: Tensors
) -> None:
    zero = {name: replace(tensor, data=bytes(len(tensor.data))) for name, tensor in tensors.items()}
    assert admit(seal(zero), expected, layout=layout).norm == 0.0


def test_the_order_of_the_clients_tensors_does_not_change_the_packet(seal: Seal, tensors: Tensors) -> None:
    assert seal(dict(reversed(tensors.items()))) == seal()


def test_bytes_that_are_no_packet_are_refused(expected: Expectation, layout: TensorLayout) -> None:
    assert refusal(b"\x80\x04K\x01.", expected, layout).reason == "bad_encoding"


def test_a_packet_beyond_the_limit_is_refused_before_it_is_read(
    seal: Seal, expected: Expectation, layout: TensorLayout
) -> None:
    assert refusal(seal(), expected, layout, max_bytes=100).reason == "too_large"


def test_more_bytes_than_the_layout_can_need_are_refused_before_they_are_read(
    expected: Expectation, layout: TensorLayout
) -> None:
    needed = sum(entry.nbytes for entry in layout)
    too_many = bytes(needed + 2 * 1000 + 65)
    assert refusal(too_many, expected, layout, max_header_bytes=1000).reason == "too_large"


def test_an_envelope_for_another_round_is_refused(seal: Seal, expected: Expectation, layout: TensorLayout) -> None:
    assert refusal(seal(round_number=1), expected, layout).reason == "wrong_round"


def test_the_same_update_again_is_refused(seal: Seal, expected: Expectation, layout: TensorLayout) -> None:
    first = admit(seal(), expected, layout=layout)
    again = replace(expected, last_counter=first.envelope.counter)
    assert refusal(seal(), again, layout).reason == "replayed"


def test_a_payload_that_was_swapped_is_refused(
    seal: Seal, expected: Expectation, layout: TensorLayout, tensors: Tensors
) -> None:
    header, _, _ = decode_packet(seal())
    tensors["head.bias"] = RawTensor("BF16", (2,), bytes(4))
    swapped = join_packet(header, encode_tensors(tensors))
    assert refusal(swapped, expected, layout).reason == "payload_digest_mismatch"


def test_a_missing_tensor_is_refused(seal: Seal, expected: Expectation, layout: TensorLayout, tensors: Tensors) -> None:
    del tensors["head.bias"]
    assert refusal(seal(tensors), expected, layout).reason == "layout_mismatch"


def test_a_norm_above_the_bound_is_refused(seal: Seal, expected: Expectation, layout: TensorLayout) -> None:
    assert refusal(seal(), expected, layout, max_norm=1.0).reason == "norm_exceeded"


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_protocol_is_refused_whatever_else_it_says(
    seal: Seal, expected: Expectation, layout: TensorLayout, version: object
) -> None:
    changed = with_header(seal(), protocol_version=version, new_field=1)
    assert refusal(changed, expected, layout).reason == "wrong_protocol"


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"protocol_version": True},
        {"num_examples": 1.5},
        {"num_examples": True},
        {"counter": "5"},
        {"client_id": 3},
        {"signature": 5},
        {"spec": 5},
        {"spec": {}},
        {"spec": []},
        {"layout": 5},
        {"layout": [5]},
        {"layout": [{"name": "head.bias", "shape": "2", "dtype": "BF16"}]},
        {"layout": [{"name": "head.bias", "shape": [2.0], "dtype": "BF16"}]},
        {"layout": [{"name": "head.bias", "shape": [2], "dtype": "BF16", "more": 1}]},
    ],
)
def test_a_header_that_is_no_envelope_is_refused(
    seal: Seal, expected: Expectation, layout: TensorLayout, changes: dict[str, Any]
) -> None:
    assert refusal(with_header(seal(), **changes), expected, layout).reason == "bad_envelope"


@pytest.mark.parametrize(
    "name",
    ["run_id", "client_id", "round_number", "phase", "task_token", "counter", "parent_version", "base_digest", "spec",
     "plan_digest", "layout", "num_examples", "payload_digest", "codec", "signature"],
)  # fmt: skip
def test_a_field_that_is_left_out_is_refused_even_with_a_default(
    seal: Seal, expected: Expectation, layout: TensorLayout, name: str
) -> None:
    header, tensors, _ = decode_packet(seal())
    del header[name]
    assert refusal(encode_packet(header, tensors), expected, layout).reason == "bad_envelope"


def test_an_update_that_cannot_travel_is_not_sealed(seal: Seal) -> None:
    with pytest.raises(WireError, match="tensor name"):
        seal({"../../etc/passwd": RawTensor("F32", (1,), bytes(4))})


def test_every_reason_is_used_and_every_used_reason_has_a_meaning() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOM.glob("*.py") if path.name != "reasons.py")
    used = set(re.findall(r'refused\("([a-z_]+)"', sources)) | set(re.findall(r'\("([a-z_]+)", "[a-z_]+"\)', sources))
    assert used == set(REASONS)


def test_the_document_lists_every_reason_with_its_meaning() -> None:
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == dict(REASONS)


def test_the_reasons_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        REASONS["new"] = "x"  # type: ignore[index]


def test_an_unknown_reason_is_a_mistake_in_the_program() -> None:
    with pytest.raises(KeyError):
        refused("no_such_reason", "", "c")


def test_the_packets_header_is_the_envelope(seal: Seal) -> None:
    packet = seal()
    header, _, _ = decode_packet(packet)
    assert packet[10:].startswith(canonical_json(header))
