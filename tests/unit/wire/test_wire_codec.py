"""Tensors and packets: what is written, what is read back, what may not be written."""

import numpy as np
import pytest
from safetensors.numpy import load as safetensors_load

from federated.errors import WireError
from federated.manifest import RawTensor, sha256_hex
from federated.wire import Limits, decode_packet, decode_tensors, encode_packet, encode_tensors
from federated.wire.codec import MAX_NAME_LENGTH

Tensors = dict[str, RawTensor]
SCALAR = RawTensor.from_array(np.array(1.0, "<f4"))


def test_tensors_come_back_bit_for_bit(tensors: Tensors) -> None:
    assert decode_tensors(encode_tensors(tensors)) == tensors


def test_no_tensors_is_a_valid_payload() -> None:
    assert decode_tensors(encode_tensors({})) == {}


def test_the_order_of_the_mapping_does_not_change_the_bytes(tensors: Tensors) -> None:
    assert encode_tensors(dict(reversed(tensors.items()))) == encode_tensors(tensors)


def test_the_library_reads_what_is_written() -> None:
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    read = safetensors_load(encode_tensors({"w": RawTensor.from_array(array)}))
    assert np.array_equal(read["w"], array)


def test_decoded_tensors_are_read_only(tensors: Tensors) -> None:
    decoded = decode_tensors(encode_tensors(tensors))["block.query.factor_a"]
    with pytest.raises(ValueError, match="read-only"):
        decoded.array[0, 0] = 9.0


def test_a_packet_comes_back_with_header_tensors_and_digest(tensors: Tensors) -> None:
    header = {"kind": "update", "nested": {"list": [1, 2.5, None, True, "\u00e9"]}}
    packet = encode_packet(header, tensors)
    assert decode_packet(packet) == (header, tensors, sha256_hex(encode_tensors(tensors)))


def test_a_packet_starts_with_magic_version_and_header_length() -> None:
    assert encode_packet({"a": 1}, {})[:17] == b"FPFT" + b"\x01\x00" + b"\x07\x00\x00\x00" + b'{"a":1}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes", "\ud800"])
def test_a_header_that_json_cannot_carry_is_not_written(value: object) -> None:
    with pytest.raises(WireError, match="cannot be written as JSON"):
        encode_packet({"a": value}, {})


@pytest.mark.parametrize("name", ["a", "_x.0-1:b/c", "n" * MAX_NAME_LENGTH])
def test_ordinary_names_are_written(name: str) -> None:
    assert list(decode_tensors(encode_tensors({name: SCALAR}))) == [name]


@pytest.mark.parametrize(
    "name", ["", ".a", "/a", "a..b", "a b", "a\n", "\u00e9", "a\0b", "a\u202eb", "__metadata__", "n" * 513]
)
def test_other_names_are_not_written(name: str) -> None:
    with pytest.raises(WireError, match="tensor name"):
        encode_tensors({name: SCALAR})


def test_a_name_that_is_no_text_is_not_written() -> None:
    with pytest.raises(WireError, match="tensor name 3"):
        encode_tensors({3: SCALAR})  # type: ignore[dict-item]


def test_a_dtype_that_may_not_travel_is_not_written() -> None:
    with pytest.raises(WireError, match="has dtype 'I8'; expected one of"):
        encode_tensors({"w": RawTensor("I8", (1,), b"\0")})


@pytest.mark.parametrize("shape", [(0,), (1, 0), (-1,), (2**31,), (True,), (1.0,), (1,) * 9, "1"])
def test_a_shape_that_may_not_travel_is_not_written(shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match="has shape"):
        encode_tensors({"w": RawTensor("F32", shape, b"\0\0\0\0")})


@pytest.mark.parametrize("size", [0, 3, 5, 8])
def test_data_that_do_not_fill_the_shape_are_not_written(size: int) -> None:
    with pytest.raises(WireError, match=f"holds {size} bytes; its dtype and shape need 4"):
        encode_tensors({"w": RawTensor("F32", (1,), bytes(size))})


def test_more_bytes_than_the_limit_are_not_read() -> None:
    data = encode_tensors({"w": SCALAR})
    with pytest.raises(WireError, match=f"found {len(data)} bytes; at most {len(data) - 1}"):
        decode_tensors(data, Limits(max_bytes=len(data) - 1))


def test_exactly_the_limit_of_bytes_is_read() -> None:
    data = encode_tensors({"w": SCALAR})
    assert decode_tensors(data, Limits(max_bytes=len(data))) == {"w": SCALAR}


def test_more_tensors_than_the_limit_are_not_read() -> None:
    data = encode_tensors({"v": SCALAR, "w": SCALAR})
    with pytest.raises(WireError, match="found 2 tensors; at most 1"):
        decode_tensors(data, Limits(max_tensors=1))


def test_a_longer_tensor_header_than_the_limit_is_not_read() -> None:
    with pytest.raises(WireError, match="a header of 56 bytes; at most 55"):
        decode_tensors(encode_tensors({"w": SCALAR}), Limits(max_header_bytes=55))


def test_a_longer_packet_header_than_the_limit_is_not_read() -> None:
    packet = encode_packet({"a": "x" * 100}, {})
    with pytest.raises(WireError, match="a header of 108 bytes; at most 99"):
        decode_packet(packet, Limits(max_header_bytes=99))


def test_a_longer_packet_than_the_limit_is_not_read() -> None:
    with pytest.raises(WireError, match="at most 10 are accepted"):
        decode_packet(encode_packet({}, {}), Limits(max_bytes=10))
