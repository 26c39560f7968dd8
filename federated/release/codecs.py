"""Weights as fewer bytes, and back to exactly the same bits everywhere: full files, and diffs from held weights.

| codec | starts from | what comes out |
|---|---|---|
| ``lossless`` | nothing | the weights |
| ``fp16``, ``bf16`` | nothing | the weights, rounded |
| ``int8``, ``int4`` | nothing | whole multiples of a scale for each 64 values |
| ``diff`` | weights of the same shapes | the weights |
| ``diff-int4``, ``diff-int2`` | the same | these plus a step of few bits, rounded to codes as of ``int8`` |
| ``recode-int8``, ``recode-int4`` | the same | what ``int8`` and ``int4`` give, bit for bit |

What comes out are canonical weights of the version's own names, shapes and dtypes; their digest is in the header, and
checked. A quantised step is encoded against what is held, so its error is part of the next step, and does not grow.
Nothing but float32, float16 and bfloat16 is ever rounded. Knows no signatures: who may say which digest is a version's
is `federated.release.records`' business. Imports neither torch nor a database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from federated.errors import EndlessData, ReleaseError, WireError, WrongContent
from federated.manifest import RawTensor, TensorLayout, layout_of, sha256_hex
from federated.release.exact import FLOATS, body_of, body_size, diff_of, patched, tensors_of
from federated.release.frame import Header, framed, opened, unpressed
from federated.release.lossy import Full, Recode, Rounded, Step
from federated.wire import DEFAULT_LIMITS, Limits, decode_tensors, encode_tensors

__all__ = ["CODECS", "DIFFS", "FULL", "LOSSLESS", "STEPS", "TWINS", "Encoded", "decode", "encode", "twin"]

Tensors = Mapping[str, RawTensor]


class _Codec(Protocol):
    def size(self, layout: TensorLayout) -> int: ...

    def write(self, new: Tensors, held: Tensors, layout: TensorLayout) -> tuple[Mapping[str, int], bytes]: ...

    def read(
        self, body: memoryview, numbers: Mapping[str, int], held: Tensors, layout: TensorLayout
    ) -> dict[str, RawTensor]: ...


class _Lossless:
    """The bits as they are."""

    def size(self, layout: TensorLayout) -> int:
        return body_size(layout)

    def write(self, new: Tensors, _: Tensors, layout: TensorLayout) -> tuple[Mapping[str, int], bytes]:
        return {}, body_of(new, layout)

    def read(self, body: memoryview, _: Mapping[str, int], __: Tensors, layout: TensorLayout) -> dict[str, RawTensor]:
        return tensors_of(body, layout)


class _Diff(_Lossless):
    """The bits as differences from held ones."""

    def write(self, new: Tensors, held: Tensors, layout: TensorLayout) -> tuple[Mapping[str, int], bytes]:
        return {}, diff_of(new, held, layout)

    def read(self, body: memoryview, _: Mapping[str, int], held: Tensors, layout: TensorLayout) -> dict[str, RawTensor]:
        return patched(body, held, layout)


_FULL: Mapping[str, _Codec] = {
    "lossless": _Lossless(),
    "fp16": Rounded("F16"),
    "bf16": Rounded("BF16"),
    "int8": Full(8),
    "int4": Full(4),
}
_CODED: Mapping[str, Full] = {
    "diff-int4": Step(4),
    "diff-int2": Step(2),
    "recode-int8": Recode(8),
    "recode-int4": Recode(4),
}
_FROM_HELD: Mapping[str, _Codec] = {"diff": _Diff(), **_CODED}
FULL, DIFFS = tuple(_FULL), tuple(_FROM_HELD)
"""Names of the codecs that start from nothing, and from held weights."""

CODECS: Mapping[str, _Codec] = {**_FULL, **_FROM_HELD}
LOSSLESS = ("lossless", "diff")
"""Codecs that give the very weights that went in."""

STEPS = ("diff-int4", "diff-int2")
"""Codecs whose outcome depends on what they start from; one of 8 bits would be larger than ``int8``."""

TWINS: Mapping[str, str] = {"recode-int8": "int8", "recode-int4": "int4", **dict.fromkeys(STEPS, "int8")}
"""The kind of full file that gives what a lossy diff gives; see `twin`."""


@dataclass(frozen=True)
class Encoded:
    """A file, and what it gives.

    Args:
        codec: its name.
        data: the file.
        weights: canonical weights that come out of it.
        source: digest of the weights that it starts from; ``""`` for a full file.
    """

    codec: str
    data: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    source: str = ""

    @property
    def result(self) -> str:
        """Digest of what comes out."""
        return sha256_hex(self.weights)


def encode(weights: bytes, codec: str, held: bytes | None = None) -> Encoded:
    """Encode canonical weights.

    Args:
        weights: of a version.
        codec: one of `FULL`, or one of `DIFFS`.
        held: what a device holds, for `DIFFS`.

    Raises:
        ReleaseError: if there is no such codec, the weights are not canonical or do not fit it (NaN, too large), or
            the held ones have other shapes.
    """
    if codec not in (FULL if held is None else DIFFS):
        raise ReleaseError(f"no codec {codec!r}; there are {', '.join(FULL)}, and from held weights {', '.join(DIFFS)}")
    new = _canonical(weights, "the weights", kind=ReleaseError)
    old = {} if held is None else _canonical(held, "the held weights", kind=ReleaseError)
    layout = layout_of(new)
    if held is not None and layout_of(old) != layout:
        raise ReleaseError("the held weights have other tensors, shapes or dtypes: there is no diff between them")
    if codec not in LOSSLESS:
        for tensors in (new, old):
            _require_finite(tensors, ReleaseError)
    numbers, body = CODECS[codec].write(new, old, layout)
    made = CODECS[codec].read(memoryview(body), numbers, old, layout)
    if codec not in LOSSLESS:
        _require_finite(made, ReleaseError)
    result, source = encode_tensors(made), "" if held is None else sha256_hex(held)
    header = Header(codec, sha256_hex(result), source, () if source else layout, numbers)
    return Encoded(codec, framed(header, body), result, source)


def twin(diff: Encoded, held: bytes) -> Encoded:
    """The full file that gives what a lossy diff gives, bit for bit.

    Args:
        diff: of one of `TWINS`.
        held: what it starts from.
    """
    header, packed = opened(diff.data, Limits(max_bytes=len(held)))
    codec, old = _CODED[diff.codec], _canonical(held, "the held weights", kind=ReleaseError)
    layout = layout_of(old)
    body = unpressed(packed, codec.size(layout), "the body of encoded weights")
    numbers, full = codec.twin(memoryview(body), header.numbers, old, layout)
    name = TWINS[diff.codec]
    return Encoded(name, framed(Header(name, header.result, "", layout, numbers), full), diff.weights)


def decode(data: bytes, held: bytes | None = None, *, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Canonical weights out of a file from anywhere.

    Args:
        data: the file.
        held: the weights that it starts from, if it is a diff.
        limits: the most that this receiver reads.

    Raises:
        WrongContent: if it is damaged, starts from other weights, or what comes out is not what it says.
        EndlessData: if it is beyond the limits.
    """
    header, packed = opened(data, limits)
    codec = CODECS.get(header.codec)
    if codec is None:
        raise WrongContent(f"weights are encoded by {header.codec!r}, which this library does not know: upgrade it")
    old, layout = _start(header, held, limits)
    if header.codec not in LOSSLESS:
        _require_finite(old, WrongContent)
    body = unpressed(packed, codec.size(layout), "the body of encoded weights")
    made = codec.read(memoryview(body), header.numbers, old, layout)
    try:
        result = encode_tensors(made)
    except WireError as error:
        raise WrongContent(f"encoded weights hold tensors that cannot be: {error}") from error
    if sha256_hex(result) != header.result:
        raise WrongContent(
            f"{header.codec} gives weights with SHA-256 {sha256_hex(result)}, expected {header.result}: damaged, or "
            f"this machine computes otherwise"
        )
    return result


def _start(header: Header, held: bytes | None, limits: Limits) -> tuple[Tensors, TensorLayout]:
    """What a file starts from, and the shapes of what comes out."""
    if header.codec in FULL and not header.source:
        return {}, header.layout
    if held is None or sha256_hex(held) != header.source or header.codec in FULL or header.layout:
        found = "none are" if held is None else f"{sha256_hex(held)[:12]} are"
        raise WrongContent(f"{header.codec} starts from weights {header.source[:12] or 'without a name'}; {found} held")
    if len(held) > limits.max_bytes:
        raise EndlessData(f"held weights of {len(held)} bytes; this device takes at most {limits.max_bytes}")
    old = _canonical(held, "the held weights", kind=WrongContent)
    return old, layout_of(old)


def _canonical(weights: bytes, what: str, *, kind: type[ReleaseError]) -> dict[str, RawTensor]:
    try:
        return decode_tensors(weights, Limits(max_bytes=len(weights) or 1))
    except WireError as error:
        raise kind(f"{what} are no canonical weights ({error})") from error


def _require_finite(tensors: Tensors, kind: type[ReleaseError]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS and not np.isfinite(tensor.array).all():
            raise kind(f"tensor {name} holds NaN or infinity, or values that this codec cannot hold; use `lossless`")
