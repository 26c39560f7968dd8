"""The file around encoded weights: a header that says what they are, and a body of streams, both compressed.

    magic "FPRC" | format version, 2 bytes | length of the header, 4 bytes | header, zstd | body, zstd

The header is canonical JSON: codec, digest of the weights that come out, digest of the weights that it starts from (a
diff), names, dtypes and shapes (a full file: a diff's are those of what it starts from), and the codec's own numbers.
Nothing here trusts its input. Every size follows from checked shapes before anything of that size is made: a file that
says that it holds more, or holds more, is refused. What streams mean is `federated.release.codecs`' business.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import zstandard

from federated.errors import EndlessData, WireError, WrongContent
from federated.manifest import DTYPE_BYTES, TensorEntry, TensorLayout, canonical_json
from federated.wire import Limits
from federated.wire.codec import MAX_DIMENSIONS, MAX_NAME_LENGTH, MAX_SIZE
from federated.wire.strict_json import parse_object, shown

__all__ = ["Header", "framed", "opened", "unpressed"]

_MAGIC, _VERSION = b"FPRC", 1
_PREFIX = struct.Struct("<4sHI")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CODEC = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_FIELDS = {"codec", "numbers", "result", "source", "tensors"}
_LEVEL = 19


@dataclass(frozen=True)
class Header:
    """What a file of encoded weights says of itself.

    Args:
        codec: its name.
        result: digest of the weights that come out.
        source: digest of the weights that it starts from; ``""`` for a full file.
        layout: the tensors, sorted by name; empty in a diff, which has those of its source.
        numbers: whole numbers that the codec needs, by name.
    """

    codec: str
    result: str
    source: str = ""
    layout: TensorLayout = ()
    numbers: Mapping[str, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        tensors = [[one.name, one.dtype, *one.shape] for one in self.layout]
        rest = {"codec": self.codec, "result": self.result, "source": self.source, "numbers": dict(self.numbers)}
        return canonical_json({**rest, "tensors": tensors})


def framed(header: Header, body: bytes) -> bytes:
    """The whole file."""
    packer = zstandard.ZstdCompressor(level=_LEVEL)
    packed = packer.compress(header.to_bytes())
    return _PREFIX.pack(_MAGIC, _VERSION, len(packed)) + packed + packer.compress(body)


def opened(data: bytes, limits: Limits) -> tuple[Header, bytes]:
    """The header, checked, and the body as it is: its size is known once its codec is.

    Args:
        data: from anywhere.
        limits: the most that this receiver reads; ``max_bytes`` also of the weights that come out.

    Raises:
        WrongContent: if it is no such file.
        EndlessData: if it, or what it stands for, is beyond the limits.
    """
    if len(data) < _PREFIX.size:
        raise WrongContent(f"encoded weights of {len(data)} bytes; expected at least {_PREFIX.size}")
    magic, version, length = _PREFIX.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise WrongContent(
            f"encoded weights begin with {shown(magic)}, format {version}; this library reads {shown(_MAGIC)}, format "
            f"{_VERSION}: upgrade federated-peft, or tell the publisher"
        )
    start = _PREFIX.size
    if length > len(data) - start:
        raise WrongContent(f"a header of {length} bytes, and {len(data) - start} follow: the file is cut short")
    packed = data[start : start + length]
    size = _declared(packed, "the header")
    if size > limits.max_header_bytes:
        raise EndlessData(f"a header of {size} bytes; this device takes at most {limits.max_header_bytes}")
    return _header(unpressed(packed, size, "the header"), limits), data[start + length :]


def unpressed(packed: bytes, size: int, what: str) -> bytes:
    """Exactly ``size`` bytes out of one zstd frame; no more are ever made.

    Args:
        packed: from anywhere.
        size: what is expected.
        what: for messages.

    Raises:
        WrongContent: if the frame says or holds another size, is damaged, or something follows it.
    """
    found = _declared(packed, what)
    if found != size:
        raise WrongContent(f"{what} is said to have {found} bytes; its shapes need {size}")
    try:
        data = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WrongContent(f"{what} cannot be decompressed ({error}): damaged or tampered with") from error
    return bytes(data)


def _declared(packed: bytes, what: str) -> int:
    """The size in a zstd frame's header, which is what would be made for it; unknown ones are refused."""
    try:
        found = zstandard.frame_content_size(packed)
    except zstandard.ZstdError as error:
        raise WrongContent(f"{what} is no zstd frame ({error}): damaged or tampered with") from error
    if found < 0:
        raise WrongContent(f"{what} does not say how large it is: this library did not write it")
    return int(found)


def _header(data: bytes, limits: Limits) -> Header:
    try:
        value = parse_object(data, "the header of encoded weights")
    except WireError as error:
        raise WrongContent(str(error)) from error
    if value.keys() != _FIELDS:
        raise WrongContent(f"the header of encoded weights has {shown(sorted(value))}; expected {sorted(_FIELDS)}")
    _check_names(value)
    _check_numbers(value["numbers"])
    header = Header(value["codec"], value["result"], value["source"], _layout(value["tensors"]), value["numbers"])
    if len(header.layout) > limits.max_tensors or sum(one.nbytes for one in header.layout) > limits.max_bytes:
        raise EndlessData(
            f"{len(header.layout)} tensors of {sum(one.nbytes for one in header.layout)} bytes; this device takes at "
            f"most {limits.max_tensors} and {limits.max_bytes}"
        )
    return header


def _check_names(value: Mapping[str, Any]) -> None:
    for name, form, may_be_empty in (("codec", _CODEC, False), ("result", _DIGEST, False), ("source", _DIGEST, True)):
        text = value[name]
        if type(text) is not str or not (form.fullmatch(text) or (may_be_empty and not text)):
            raise WrongContent(f"the header of encoded weights has {name} {shown(text)}")


def _check_numbers(value: Any) -> None:
    if type(value) is not dict or not all(type(one) is int and abs(one) < 2**31 for one in value.values()):
        raise WrongContent(f"the header of encoded weights has numbers {shown(value)}; expected whole ones")


def _layout(value: Any) -> TensorLayout:
    if type(value) is not list:
        raise WrongContent(f"the header of encoded weights has tensors {shown(value)}; expected a list")
    entries = tuple(map(_entry, value))
    names = [one.name for one in entries]
    if names != sorted(set(names)):
        raise WrongContent("the header of encoded weights does not name its tensors once and in order")
    return entries


def _entry(value: Any) -> TensorEntry:
    if type(value) is not list or len(value) < 2 or type(value[0]) is not str or len(value[0]) > MAX_NAME_LENGTH:
        raise WrongContent(f"encoded weights have a tensor {shown(value)}; expected its name, dtype and shape")
    name, dtype, *shape = value
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise WrongContent(f"tensor {shown(name)} has dtype {shown(dtype)}; expected one of {sorted(DTYPE_BYTES)}")
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 1 <= size <= MAX_SIZE for size in shape):
        raise WrongContent(f"tensor {shown(name)} has shape {shown(shape)}")
    return TensorEntry(name, tuple(shape), dtype)
