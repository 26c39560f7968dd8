"""Packets that are not what this library writes."""

import struct
from dataclasses import replace

import pytest

from federated.errors import UpdateRejected, WireError
from federated.manifest import AdapterSpec, Envelope, RawTensor, canonical_json, sha256_hex
from federated.wire import Expectation, Limits, admit, decode_packet, encode_packet, encode_tensors

PAYLOAD = encode_tensors({"w": RawTensor("F32", (1,), bytes(4))})
LIMITS = Limits(max_bytes=4 * 2**20, max_header_bytes=2**20)


def packet_of(header: bytes, payload: bytes = PAYLOAD, *, magic: bytes = b"FPFT", version: int = 1) -> bytes:
    return struct.pack("<4sHI", magic, version, len(header)) + header + payload


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "a packet has at least 10"),
    "nine bytes": (packet_of(b"{}")[:9], "a packet has at least 10"),
    "other magic": (packet_of(b"{}", magic=b"GGUF"), "found b'GGUF' at the start"),
    "zip": (b"PK\x03\x04" + bytes(30), "at the start"),
    "bare safetensors": (PAYLOAD, "at the start"),
    "format 0": (packet_of(b"{}", version=0), "packet format 0"),
    "format 2": (packet_of(b"{}", version=2), "packet format 2; this library reads 1"),
    "header of 4 GiB": (struct.pack("<4sHI", b"FPFT", 1, 2**32 - 1) + bytes(64), "at most 1048576"),
    "header beyond the packet": (struct.pack("<4sHI", b"FPFT", 1, 100) + b"{}", "cut short"),
    "no header": (packet_of(b""), "not strict JSON"),
    "no JSON": (packet_of(b"{'a':1}"), "not strict JSON"),
    "not UTF-8": (packet_of(b'{"a":"\xff"}'), "not strict JSON"),
    "text after the object": (packet_of(b"{}{}"), "not strict JSON"),
    "a list": (packet_of(b"[]"), "is a JSON list; expected an object"),
    "a string": (packet_of(b'"a"'), "is a JSON str; expected an object"),
    "NaN": (packet_of(b'{"a":NaN}'), "NaN is not allowed"),
    "Infinity": (packet_of(b'{"a":Infinity}'), "Infinity is not allowed"),
    "hidden infinity": (packet_of(b'{"a":1e999}'), "not canonical"),
    "duplicate key": (packet_of(b'{"a":1,"a":2}'), "duplicate key 'a'"),
    "deep duplicate key": (packet_of(b'{"a":{"b":1,"b":1}}'), "duplicate key 'b'"),
    "nesting": (packet_of(b'{"a":' + b"[" * 100_000), "nests deeper than 16"),
    "17 levels": (packet_of(b'{"a":' + b"[" * 16 + b"]" * 16 + b"}"), "nests deeper than 16"),
    "half a character": (packet_of(b'{"a":"\\ud800"}'), "not canonical"),
    "needless escape": (packet_of(b'{"\\u0061":1}'), "not canonical"),
    "spaces": (packet_of(b'{"a": 1}'), "not canonical"),
    "unsorted": (packet_of(b'{"b":1,"a":1}'), "not canonical"),
    "1.50": (packet_of(b'{"a":1.50}'), "not canonical"),
    "minus zero": (packet_of(b'{"a":-0}'), "not canonical"),
}

PAYLOADS: dict[str, tuple[bytes, str]] = {
    "no payload": (b"", "found 0 bytes of tensors"),
    "payload cut short": (PAYLOAD[:-1], "no gap, no overlap"),
    "trailing bytes": (PAYLOAD + b"\0", "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", [*HOSTILE, *PAYLOADS])
def test_a_hostile_packet_is_refused(case: str) -> None:
    data, message = HOSTILE[case] if case in HOSTILE else (packet_of(b"{}", PAYLOADS[case][0]), PAYLOADS[case][1])
    with pytest.raises(WireError) as caught:
        decode_packet(data, LIMITS)
    assert message in str(caught.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_update_is_refused_as_badly_encoded(case: str) -> None:
    spec = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=())
    expected = Expectation("run", 1, 1, "client", "token", "parent", "base", spec, "plan")
    with pytest.raises(UpdateRejected) as caught:
        admit(HOSTILE[case][0], expected, layout=(), limits=LIMITS)
    assert (caught.value.reason, caught.value.client_id) == ("bad_encoding", "client")


@pytest.mark.parametrize("case", PAYLOADS)
def test_a_hostile_payload_is_refused_as_another_one_and_where_it_was_sealed_as_badly_encoded(case: str) -> None:
    spec = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=())
    expected = Expectation("run", 1, 1, "client", "token", "parent", "base", spec, "plan")
    envelope = Envelope("run", "client", 1, 1, "token", 1, "parent", "base", spec, "plan", (), 1, sha256_hex(PAYLOAD))
    data, message = PAYLOADS[case]
    sealed = replace(envelope, payload_digest=sha256_hex(data))
    for one, reason in ((envelope, "payload_digest_mismatch"), (sealed, "bad_encoding")):
        with pytest.raises(UpdateRejected) as caught:
            admit(packet_of(canonical_json(one.to_dict()), data), expected, layout=(), limits=LIMITS)
        assert caught.value.reason == reason
    assert message in str(caught.value)


def test_sixteen_levels_are_read() -> None:
    header = {"a": [[[[[[[[[[[[[[[]]]]]]]]]]]]]]]}
    assert decode_packet(encode_packet(header, {}), LIMITS)[0] == header


def test_brackets_inside_a_string_are_no_nesting() -> None:
    header = {"a": '[[[[[[[[[[[[[[[[[[[["\\'}
    assert decode_packet(encode_packet(header, {}), LIMITS)[0] == header
