"""Files that safetensors or a careless reader would accept, and that must be refused."""

import json
import struct
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest

from federated.errors import WireError
from federated.manifest import RawTensor
from federated.wire import Limits, decode_tensors, encode_tensors

LIMITS = Limits(max_bytes=4 * 2**20, max_header_bytes=2**20)


def file_of(header: bytes | dict[str, Any], body: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file from parts, padded as the library pads."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    padded = text + b" " * (-len(text) % 8)
    return struct.pack("<Q", len(padded) if length is None else length) + padded + body


def entry(begin: int = 0, end: int = 4, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [begin, end], **changes}


GOOD = file_of({"w": entry()}, b"\0\0\x80?")
E32 = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def test_the_file_that_all_others_are_variations_of_is_accepted() -> None:
    assert decode_tensors(GOOD)["w"].array.tolist() == [1.0]


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "found 0 bytes"),
    "seven bytes": (bytes(7), "found 7 bytes"),
    "header length 2^63": (struct.pack("<Q", 2**63) + bytes(64), "a header of 9223372036854775808 bytes; at most"),
    "header beyond the file": (file_of(b"{}", length=9), "cut short"),
    "header over the limit": (file_of(b" " * 2**21), "a header of 2097152 bytes; at most 1048576"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os\x94.", "a header of"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "not strict JSON"),
    "UTF-16": (file_of('{"w":1}'.encode("utf-16")), "not strict JSON"),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}"), "not strict JSON"),
    "no JSON": (file_of(b"{"), "not strict JSON"),
    "a list": (file_of(b"[]"), "is a JSON list; expected an object"),
    "a number": (file_of(b"7"), "is a JSON int; expected an object"),
    "null": (file_of(b"null"), "is a JSON NoneType"),
    "nested brackets": (file_of(b"[" * 100_000), "nests deeper than 16"),
    "nested objects": (file_of(b'{"a":' * 100_000), "nests deeper than 16"),
    "quotes that never close": (file_of(b'"\\' * 500_000), "not strict JSON"),
    "a number of 5000 digits": (file_of(b'{"w":' + b"9" * 5000 + b"}"), "not strict JSON"),
    "NaN": (file_of(b'{"w":NaN}'), "NaN is not allowed"),
    "Infinity": (file_of(b'{"w":-Infinity}'), "-Infinity is not allowed"),
    "duplicate tensor": (file_of(b'{"w":' + E32 + b',"w":' + E32 + b"}", bytes(4)), "duplicate key 'w'"),
    "escaped duplicate": (file_of(b'{"w":' + E32 + b',"\\u0077":' + E32 + b"}", bytes(4)), "duplicate key 'w'"),
    "duplicate field": (file_of(b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
                        "duplicate key 'dtype'"),
    "extra field": (file_of({"w": entry(note="x")}, bytes(4)), "expected exactly"),
    "missing field": (file_of({"w": {"dtype": "F32", "shape": [1]}}, bytes(4)), "expected exactly"),
    "entry is a list": (file_of({"w": ["F32", [1], [0, 4]]}, bytes(4)), "expected exactly"),
    "metadata": (file_of({"__metadata__": {"format": "pt"}, "w": entry()}, bytes(4)), "expected exactly"),
    "tensor called metadata": (file_of({"__metadata__": entry()}, bytes(4)), "not accepted in names"),
    "path": (file_of({"../../etc/passwd": entry()}, bytes(4)), "tensor name"),
    "absolute path": (file_of({"/etc/passwd": entry()}, bytes(4)), "tensor name"),
    "path inside": (file_of({"a/../../b": entry()}, bytes(4)), "not accepted in names"),
    "empty name": (file_of({"": entry()}, bytes(4)), "tensor name ''"),
    "NUL in name": (file_of({"w\0x": entry()}, bytes(4)), "tensor name"),
    "right-to-left name": (file_of({"w\u202ex": entry()}, bytes(4)), r"tensor name 'w\u202ex'"),
    "half a character": (file_of(b'{"\\ud800":' + E32 + b"}", bytes(4)), "tensor name"),
    "newline at the end of a name": (file_of({"w\n": entry()}, bytes(4)), "tensor name"),
    "name of 500 KB": (file_of({"w" * 500_000: entry()}, bytes(4)), "tensor name"),
    "I32": (file_of({"w": entry(dtype="I32")}, bytes(4)), "has dtype 'I32'"),
    "BOOL": (file_of({"w": entry(dtype="BOOL", shape=[4])}, bytes(4)), "has dtype 'BOOL'"),
    "C64": (file_of({"w": entry(0, 8, dtype="C64")}, bytes(8)), "has dtype 'C64'"),
    "F4": (file_of({"w": entry(0, 1, dtype="F4", shape=[2])}, bytes(1)), "has dtype 'F4'"),
    "lower-case dtype": (file_of({"w": entry(dtype="f32")}, bytes(4)), "has dtype 'f32'"),
    "dtype is a list": (file_of({"w": entry(dtype=["F32"])}, bytes(4)), "has dtype ['F32']"),
    "size 0": (file_of({"w": entry(0, 0, shape=[0])}), "has shape [0]"),
    "size 2^62 by 0": (file_of({"w": entry(0, 0, shape=[2**62, 0])}), "has shape"),
    "size 2^62": (file_of({"w": entry(shape=[2**62])}, bytes(4)), "has shape"),
    "overflowing product": (file_of({"w": entry(shape=[2**31 - 1] * 8)}, bytes(4)), "no gap, no overlap"),
    "size of 4000 digits": (file_of(b'{"w":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}'),
                            "has shape"),
    "negative size": (file_of({"w": entry(shape=[-1])}, bytes(4)), "has shape [-1]"),
    "float size": (file_of({"w": entry(shape=[1.0])}, bytes(4)), "has shape [1.0]"),
    "true size": (file_of({"w": entry(shape=[True])}, bytes(4)), "has shape [True]"),
    "shape is a string": (file_of({"w": entry(shape="1")}, bytes(4)), "has shape '1'"),
    "10 000 dimensions": (file_of({"w": entry(shape=[1] * 10_000)}, bytes(4)), "at most 8 dimensions"),
    "overlap": (file_of({"v": entry(), "w": entry()}, bytes(4)), "no gap, no overlap"),
    "gap": (file_of({"v": entry(), "w": entry(8, 12)}, bytes(12)), "no gap, no overlap"),
    "gap at the start": (file_of({"w": entry(4, 8)}, bytes(8)), "no gap, no overlap"),
    "negative offset": (file_of({"w": entry(-4, 0)}, bytes(4)), "no gap, no overlap"),
    "wrong size": (file_of({"w": entry(0, 8)}, bytes(8)), "no gap, no overlap"),
    "offset beyond the file": (file_of({"w": entry()}, bytes(3)), "of 3 bytes"),
    "no data": (file_of({"w": entry()}), "of 0 bytes"),
    "trailing bytes": (file_of({"w": entry()}, bytes(4) + b"PK\x05\x06"), "4 bytes after the last tensor"),
    "data without tensors": (file_of(b"{}", bytes(4)), "4 bytes after the last tensor"),
    "float offsets": (file_of({"w": entry(0.0, 4.0)}, bytes(4)), "not in canonical form"),
    "false offset": (file_of({"w": entry(False, 4)}, bytes(4)), "not in canonical form"),
    "offsets are text": (file_of({"w": entry(data_offsets="04")}, bytes(4)), "no gap, no overlap"),
    "three offsets": (file_of({"w": entry(data_offsets=[0, 4, 4])}, bytes(4)), "no gap, no overlap"),
    "leading space": (file_of(b' {"w":' + E32 + b"}", bytes(4)), "not in canonical form"),
    "more padding": (file_of(b'{"w":' + E32 + b"}" + b" " * 8, bytes(4)), "not in canonical form"),
    "padding with tabs": (file_of(b'{"w":' + E32 + b"}\t\t", bytes(4)), "not in canonical form"),
    "no padding": (struct.pack("<Q", 54) + b'{"w":' + E32 + b"}" + bytes(4), "not in canonical form"),
    "spaces inside": (file_of(b'{"w": ' + E32 + b"}", bytes(4)), "not in canonical form"),
    "escaped name": (file_of(b'{"\\u0077":' + E32 + b"}", bytes(4)), "not in canonical form"),
    "other field order": (file_of(b'{"w":{"shape":[1],"dtype":"F32","data_offsets":[0,4]}}', bytes(4)),
                          "not in canonical form"),
    "other tensor order": (file_of({"w": entry(), "v": entry(4, 8)}, bytes(8)), "not in canonical form"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(case: str) -> None:
    data, message = HOSTILE[case]
    with pytest.raises(WireError) as caught:
        decode_tensors(data, LIMITS)
    assert message in str(caught.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_refusal_is_one_short_printable_line(case: str) -> None:
    with pytest.raises(WireError) as caught:
        decode_tensors(HOSTILE[case][0], LIMITS)
    message = str(caught.value)
    assert message.isascii() and message.isprintable() and len(message) < 400


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_file_that_was_cut_short_is_refused(length: int) -> None:
    with pytest.raises(WireError):
        decode_tensors(GOOD[:length], LIMITS)


@pytest.mark.parametrize("place", range(len(GOOD) - 4))
def test_a_flipped_bit_before_the_data_is_refused_or_read_as_it_stands(place: int) -> None:
    damaged = bytearray(GOOD)
    damaged[place] ^= 1
    try:
        tensors = decode_tensors(bytes(damaged), LIMITS)
    except WireError:
        return
    assert encode_tensors(tensors) == bytes(damaged)  # another name or dtype, honestly written


def test_nesting_is_refused_where_the_interpreter_sets_no_limit() -> None:
    data = file_of(b"[" * 5000 + b"]" * 5000)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        with pytest.raises(WireError, match="nests deeper"):
            decode_tensors(data, LIMITS)
    finally:
        sys.setrecursionlimit(limit)


def test_memory_stays_within_a_few_times_the_limit() -> None:
    data = encode_tensors({"w": RawTensor.from_array(np.zeros(2**18, "<f4"))})
    tracemalloc.start()
    decode_tensors(data, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(data)


def test_claims_of_size_allocate_nothing() -> None:
    data = file_of({f"t{i}": entry(shape=[2**31 - 1, 2**20]) for i in range(1000)})
    tracemalloc.start()
    with pytest.raises(WireError):
        decode_tensors(data, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * len(data)
