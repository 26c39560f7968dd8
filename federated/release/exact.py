"""Codecs that keep bits: tensors as rows of whole numbers, one row for each width, and differences of such rows.

    row = bits of all tensors of that width        diff: row = folded(ordered(new) - ordered(held))

Called by `federated.release.codecs`; sizes are checked before anything here reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from federated.manifest import DTYPE_BYTES, RawTensor, TensorEntry
from federated.release.planes import folded, ordered, shuffled, unfolded, unordered, unshuffled

__all__ = ["FLOATS", "body_of", "body_size", "diff_of", "patched", "tensors_of"]

FLOATS = ("F32", "F16", "BF16")
"""Dtypes whose order is that of `ordered` bits, and which lossy codecs may round."""

Numbers = npt.NDArray[Any]
Tensors = Mapping[str, RawTensor]


def body_size(layout: Iterable[TensorEntry]) -> int:
    """Bytes of the rows of such tensors."""
    return sum(one.nbytes for one in layout)


def body_of(tensors: Tensors, layout: Iterable[TensorEntry]) -> bytes:
    """The bits of some tensors."""
    return _body(layout, lambda one: _bits(tensors[one.name]))


def tensors_of(body: bytes | memoryview, layout: Iterable[TensorEntry]) -> dict[str, RawTensor]:
    """The reverse of `body_of`."""
    return {one.name: _tensor(one, bits) for one, bits in _cut(body, layout)}


def diff_of(tensors: Tensors, held: Tensors, layout: Iterable[TensorEntry]) -> bytes:
    """What must be added to held tensors to get others of the same layout."""
    return _body(layout, lambda one: folded(_ordered(tensors[one.name]) - _ordered(held[one.name])))


def patched(body: bytes | memoryview, held: Tensors, layout: Iterable[TensorEntry]) -> dict[str, RawTensor]:
    """The reverse of `diff_of`."""
    made = {}
    for one, steps in _cut(body, layout):
        numbers = _ordered(held[one.name]) + unfolded(steps)
        made[one.name] = _tensor(one, unordered(numbers) if one.dtype in FLOATS else numbers)
    return made


def _bits(tensor: RawTensor) -> Numbers:
    return np.frombuffer(tensor.data, dtype=f"<u{DTYPE_BYTES[tensor.dtype]}")


def _ordered(tensor: RawTensor) -> Numbers:
    return ordered(_bits(tensor)) if tensor.dtype in FLOATS else _bits(tensor)


def _tensor(entry: TensorEntry, bits: Numbers) -> RawTensor:
    return RawTensor(entry.dtype, entry.shape, bits.astype(bits.dtype.newbyteorder("<"), copy=False).tobytes())


def _widths(layout: Iterable[TensorEntry]) -> dict[int, list[TensorEntry]]:
    """Tensors by the width of their numbers, in a fixed order."""
    found: dict[int, list[TensorEntry]] = {}
    for one in layout:
        found.setdefault(DTYPE_BYTES[one.dtype], []).append(one)
    return dict(sorted(found.items()))


def _body(layout: Iterable[TensorEntry], row: Callable[[TensorEntry], Numbers]) -> bytes:
    return b"".join(shuffled(np.concatenate(list(map(row, tensors)))) for tensors in _widths(layout).values())


def _cut(body: bytes | memoryview, layout: Iterable[TensorEntry]) -> Iterable[tuple[TensorEntry, Numbers]]:
    start, view = 0, memoryview(body)
    for width, tensors in _widths(layout).items():
        end = start + body_size(tensors)
        row, at = unshuffled(view[start:end], width), 0
        for one in tensors:
            count = one.nbytes // width
            yield one, row[at : at + count]
            at += count
        start = end
