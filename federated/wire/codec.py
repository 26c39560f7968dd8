"""Named tensors as bytes: canonical safetensors, and packets that put a JSON header in front of them.

Canonical means that one set of tensors has exactly one encoding: what `safetensors.serialize` writes, without
metadata. Decoding accepts bytes only if encoding what was read would give the same bytes again, so that a digest of
the bytes is a digest of the adapter; the data are taken as they are, so writing the header again is enough to see that.
The library's own reader is more forgiving (duplicate keys, unknown fields, any name), which is why the header is parsed
here. Fields of a packet's header are not interpreted here: `envelope` does.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import TensorSpec, serialize

from federated.errors import WireError
from federated.manifest import DTYPE_BYTES, RawTensor, canonical_json, sha256_hex
from federated.wire.limits import DEFAULT_LIMITS, Limits
from federated.wire.strict_json import parse_object, shown

__all__ = [
    "FORMAT_VERSION",
    "MAGIC",
    "MAX_DIMENSIONS",
    "MAX_NAME_LENGTH",
    "MAX_SIZE",
    "decode_packet",
    "decode_tensors",
    "encode_packet",
    "encode_tensors",
    "join_packet",
    "split_packet",
]

MAGIC = b"FPFT"
"""First four bytes of every packet."""

FORMAT_VERSION = 1
"""Version of the packet format; independent of the envelope's protocol version."""

MAX_NAME_LENGTH = 512
"""Longest tensor name, in characters."""

MAX_DIMENSIONS = 8
"""Largest number of dimensions of a tensor; 0 (a scalar) is allowed."""

MAX_SIZE = 2**31 - 1
"""Largest size of one dimension; the smallest is 1."""

_PREFIX = struct.Struct("<4sHI")  # magic, format version, length of the JSON header
_LENGTH = struct.Struct("<Q")  # length of the safetensors header
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]*")
_ORDER = ("I64", "F64", "F32", "BF16", "F16", "U8")  # the library's; tensors of one dtype are in order of name
_RESERVED = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_LIBRARY_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "U8": "uint8",
}


def encode_tensors(tensors: Mapping[str, RawTensor]) -> bytes:
    """Encode as canonical safetensors; the order of ``tensors`` does not matter.

    The digest of these bytes is what a version's ``weights_digest`` and an envelope's ``payload_digest`` name.

    Args:
        tensors: name to tensor; may be empty.

    Raises:
        WireError: for a name, dtype, shape or data length that `decode_tensors` would refuse.
    """
    buffers = {name: _buffer(name, tensor) for name, tensor in tensors.items()}
    # The library copies from raw addresses: `buffers` keeps what they point at alive until it is done.
    specs = {
        name: TensorSpec(
            dtype=_LIBRARY_NAMES[tensor.dtype],
            shape=tensor.shape,
            data_ptr=buffers[name].ctypes.data,
            data_len=buffers[name].nbytes,
        )
        for name, tensor in tensors.items()
    }
    return bytes(serialize(specs))


def decode_tensors(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> dict[str, RawTensor]:
    """Decode canonical safetensors, bit for bit, without copying them.

    Args:
        data: bytes from anywhere.
        limits: what this receiver is willing to read.

    Returns:
        Name to tensor; their data are read-only views of ``data``, which stays in memory as long as they do.

    Raises:
        WireError: for anything that `encode_tensors` would not have written, or that is beyond the limits.
    """
    _check_length(data, limits)
    header, start = _tensor_header(data, limits)
    if len(header) > limits.max_tensors:
        raise WireError(f"found {len(header)} tensors; at most {limits.max_tensors} are accepted")
    tensors = _tile(header, memoryview(data)[start:])
    if _header_of(tensors) != data[_LENGTH.size : start]:
        raise WireError("the tensors are not in canonical form; expected exactly the bytes that safetensors writes")
    return tensors


def encode_packet(header: Mapping[str, Any], tensors: Mapping[str, RawTensor]) -> bytes:
    """Encode a packet: magic, format version, header length, canonical JSON header, canonical safetensors.

    Args:
        header: plain JSON data with string keys.
        tensors: name to tensor; may be empty.

    Raises:
        WireError: for a header that is not plain JSON, or tensors that cannot travel.
    """
    return join_packet(header, encode_tensors(tensors))


def join_packet(header: Mapping[str, Any], payload: bytes) -> bytes:
    """`encode_packet` for tensors that are already encoded.

    Raises:
        WireError: for a header that is not plain JSON.
    """
    try:
        encoded = canonical_json(dict(header))
    except (TypeError, ValueError) as error:
        raise WireError(f"the packet header cannot be written as JSON ({error}); expected plain data") from None
    return _PREFIX.pack(MAGIC, FORMAT_VERSION, len(encoded)) + encoded + payload


def decode_packet(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[dict[str, Any], dict[str, RawTensor], str]:
    """Decode a packet.

    Args:
        data: bytes from anywhere.
        limits: what this receiver is willing to read.

    Returns:
        The header, the tensors (read-only views of ``data``), and the SHA-256 of the payload.

    Raises:
        WireError: for anything that `encode_packet` would not have written, or that is beyond the limits.
    """
    header, payload = split_packet(data, limits)
    return header, decode_tensors(payload, limits), sha256_hex(payload)


def split_packet(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[dict[str, Any], memoryview]:
    """A packet's header, and its payload as bytes that nothing was read of yet: a view of ``data``.

    Raises:
        WireError: for a header that `encode_packet` would not have written, or that is beyond the limits.
    """
    _check_length(data, limits)
    header, start = _packet_header(data, limits)
    return header, memoryview(data)[start:]


def _check_length(data: bytes | memoryview, limits: Limits) -> None:
    if len(data) > limits.max_bytes:
        raise WireError(f"found {len(data)} bytes; at most {limits.max_bytes} are accepted")


def _packet_header(data: bytes, limits: Limits) -> tuple[dict[str, Any], int]:
    if len(data) < _PREFIX.size:
        raise WireError(f"found {len(data)} bytes; a packet has at least {_PREFIX.size}")
    magic, version, length = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"found {shown(magic)} at the start; a packet starts with {shown(MAGIC)}")
    if version != FORMAT_VERSION:
        raise WireError(f"packet format {version}; this library reads {FORMAT_VERSION}: update the older side")
    encoded = _slice(data, _PREFIX.size, length, limits)
    header = parse_object(encoded, "packet header")
    if _canonical(header) != encoded:
        raise WireError("the packet header is not canonical JSON; expected sorted keys, no spaces, shortest numbers")
    return header, _PREFIX.size + length


def _canonical(header: dict[str, Any]) -> bytes | None:
    try:
        return canonical_json(header)
    except ValueError:  # 1e999 reads as infinity, "\ud800" as half a character: neither can be written again
        return None


def _tensor_header(data: bytes | memoryview, limits: Limits) -> tuple[dict[str, Any], int]:
    if len(data) < _LENGTH.size:
        raise WireError(f"found {len(data)} bytes of tensors; expected at least {_LENGTH.size}")
    (length,) = _LENGTH.unpack_from(data)
    encoded = _slice(data, _LENGTH.size, length, limits)
    return parse_object(encoded, "tensor header"), _LENGTH.size + length


def _slice(data: bytes | memoryview, start: int, length: int, limits: Limits) -> bytes:
    """A header of ``length`` bytes at ``start``, after checking that it is allowed and there."""
    if length > limits.max_header_bytes:
        raise WireError(f"a header of {length} bytes; at most {limits.max_header_bytes} are accepted")
    if length > len(data) - start:
        raise WireError(f"a header of {length} bytes; only {len(data) - start} follow: the data is cut short")
    return bytes(data[start : start + length])


def _tile(header: Mapping[str, Any], body: memoryview) -> dict[str, RawTensor]:
    """Cut ``body`` into the header's tensors, which must cover it from the first byte to the last, in order."""
    tensors: dict[str, RawTensor] = {}
    start = 0
    for name, entry in header.items():
        dtype, shape, offsets = _fields(name, entry)
        end = start + _num_bytes(name, dtype, shape)
        if offsets != [start, end] or end > len(body):
            found = f"tensor {shown(name)} is said to be at {shown(offsets)} of {len(body)} bytes"
            raise WireError(f"{found}; expected [{start}, {end}]: no gap, no overlap, nothing cut short")
        tensors[name] = RawTensor(dtype, tuple(shape), body[start:end])
        start = end
    if start != len(body):
        raise WireError(f"found {len(body) - start} bytes after the last tensor; expected none")
    return tensors


def _fields(name: str, entry: Any) -> tuple[Any, Any, Any]:
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise WireError(f"tensor {shown(name)} is described by {shown(entry)}; expected exactly {sorted(_FIELDS)}")
    return entry["dtype"], entry["shape"], entry["data_offsets"]


def _num_bytes(name: Any, dtype: Any, shape: Any) -> int:
    """Check the description of one tensor and give its size in bytes."""
    if type(name) is not str or len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        raise WireError(f"tensor name {shown(name)}; expected 1 to {MAX_NAME_LENGTH} letters, digits or any of _.:/-")
    if ".." in name or name == _RESERVED:
        raise WireError(f"tensor name {shown(name)}; '..' and {_RESERVED!r} are not accepted in names")
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise WireError(f"tensor {name} has dtype {shown(dtype)}; expected one of {sorted(DTYPE_BYTES)}")
    if type(shape) not in (list, tuple) or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"tensor {name} has shape {shown(shape)}; expected at most {MAX_DIMENSIONS} dimensions")
    if not all(type(size) is int and 1 <= size <= MAX_SIZE for size in shape):
        raise WireError(f"tensor {name} has shape {shown(shape)}; expected integers from 1 to {MAX_SIZE}")
    return int(math.prod(shape)) * DTYPE_BYTES[dtype]


def _header_of(tensors: Mapping[str, RawTensor]) -> bytes:
    """The header that the library writes for these tensors, with its padding."""
    entries, start = dict[str, Any](), 0
    for name in sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        end = start + len(tensor.data)
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _LENGTH.size)


def _buffer(name: str, tensor: RawTensor) -> npt.NDArray[np.uint8]:
    """The tensor's bytes as an array, after checking that there are as many as its shape needs."""
    expected, found = _num_bytes(name, tensor.dtype, tensor.shape), memoryview(tensor.data).nbytes
    if found != expected:
        raise WireError(f"tensor {name} holds {found} bytes; its dtype and shape need {expected}")
    return np.frombuffer(tensor.data, dtype=np.uint8)
