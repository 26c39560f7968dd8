"""Codecs that round floats: to 16 bits, or to codes with a scale for each group. What is no float is kept as it is.

Two kinds of diff end at codes, so that a full file can give the same bits. A *recode* goes to the codes of the version
itself: both sides predict them from the held values, and the diff says by how much the prediction is wrong, which is
mostly zero. A *step* says in few bits how far the version is from what is held, and both sides round what that leads to
to codes of 8 bits; its error is part of the next step, because that is encoded against what came out.

All is float32 arithmetic with one rounding at a time, in a fixed order. Called by `federated.release.codecs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from federated.errors import WrongContent
from federated.manifest import RawTensor, TensorEntry, TensorLayout
from federated.release.exact import FLOATS, body_of, body_size, diff_of, patched, tensors_of
from federated.release.planes import (
    folded,
    packed,
    packed_size,
    shuffled,
    sliced,
    sliced_size,
    unfolded,
    unpacked,
    unshuffled,
    unsliced,
)
from federated.release.quantise import LEVELS, MOST_SHIFT, Codes, Floats, Groups, nearest_codes, quantise, values_of

__all__ = ["Full", "Recode", "Rounded", "Step"]

Tensors = Mapping[str, RawTensor]
Numbers = Mapping[str, int]


class Rounded:
    """float32 rounded to 16 bits; tensors that have 16 bits already keep theirs.

    Args:
        dtype: ``"F16"`` or ``"BF16"``.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def size(self, layout: TensorLayout) -> int:
        """Bytes of a body."""
        return body_size(self._narrow(layout))

    def write(self, new: Tensors, _: Tensors, layout: TensorLayout) -> tuple[Numbers, bytes]:
        """Numbers and body."""
        return {}, body_of({one.name: self._narrowed(new[one.name]) for one in layout}, self._narrow(layout))

    def read(self, body: memoryview, _: Numbers, __: Tensors, layout: TensorLayout) -> dict[str, RawTensor]:
        """The tensors that come out."""
        narrow = tensors_of(body, self._narrow(layout))
        wide = [one for one in layout if one.dtype == "F32"]
        return narrow | {one.name: RawTensor.from_array(narrow[one.name].array.astype(np.float32)) for one in wide}

    def _narrowed(self, tensor: RawTensor) -> RawTensor:
        return _cast(tensor.array, self.dtype, tensor.shape) if tensor.dtype == "F32" else tensor

    def _narrow(self, layout: TensorLayout) -> TensorLayout:
        return tuple(replace(one, dtype=self.dtype) if one.dtype == "F32" else one for one in layout)


class Full:
    """Codes of the weights themselves.

    Args:
        bits: of a code.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def size(self, layout: TensorLayout) -> int:
        """Bytes of a body."""
        floats, others = _parted(layout)
        return self.coded_size(_groups(floats)) + body_size(others)

    def write(self, new: Tensors, held: Tensors, layout: TensorLayout) -> tuple[Numbers, bytes]:
        """Numbers and body."""
        floats, others = _parted(layout)
        numbers, coded = self.coded(_values(new, floats), _values(held, floats if held else ()), _groups(floats))
        return numbers, coded + (diff_of(new, held, others) if held else body_of(new, others))

    def read(self, body: memoryview, numbers: Numbers, held: Tensors, layout: TensorLayout) -> dict[str, RawTensor]:
        """The tensors that come out."""
        floats, others = _parted(layout)
        groups, end = _groups(floats), self.coded_size(_groups(floats))
        made = _tensors(values_of(self._found(body, numbers, held, floats), groups), floats)
        return made | (patched(body[end:], held, others) if held else tensors_of(body[end:], others))

    def twin(self, body: memoryview, numbers: Numbers, held: Tensors, layout: TensorLayout) -> tuple[Numbers, bytes]:
        """Numbers and body of the full file that gives the same."""
        floats, others = _parted(layout)
        found = self._found(body, numbers, held, floats)
        kept = self.read(body, numbers, held, layout)
        return {"shift": found.shift}, _scales(found) + _codes(found, self.bits) + body_of(kept, others)

    def coded_size(self, groups: Groups) -> int:
        """Bytes that stand for the floats."""
        return 2 * groups.count + packed_size(groups.values, self.bits)

    def coded(self, new: Floats, _: Floats, groups: Groups) -> tuple[Numbers, bytes]:
        """Numbers, and what stands for the floats."""
        found = quantise(new, groups, self.bits)
        return {"shift": found.shift}, _scales(found) + _codes(found, self.bits)

    def landed(self, body: memoryview, numbers: Numbers, _: Floats, groups: Groups) -> Codes:
        """The codes of what comes out."""
        return _read_codes(body, numbers, groups, self.bits)

    def _found(self, body: memoryview, numbers: Numbers, held: Tensors, floats: TensorLayout) -> Codes:
        return self.landed(body, numbers, _values(held, floats if held else ()), _groups(floats))


class Recode(Full):
    """The codes of `Full`, as differences from those that the held weights would have under the same scales."""

    def coded_size(self, groups: Groups) -> int:
        """See `Full`."""
        return 2 * groups.count + sliced_size(groups.values)

    def coded(self, new: Floats, held: Floats, groups: Groups) -> tuple[Numbers, bytes]:
        """See `Full`."""
        found = quantise(new, groups, self.bits)
        wrong = found.codes.view(np.uint8) - self._expected(held, groups, found.scales, found.shift)
        return {"shift": found.shift}, _scales(found) + sliced(folded(wrong))

    def landed(self, body: memoryview, numbers: Numbers, held: Floats, groups: Groups) -> Codes:
        """See `Full`."""
        at = 2 * groups.count
        scales, shift = _checked(body[:at], numbers, "shift")
        wrong = unfolded(unsliced(body[at : self.coded_size(groups)], groups.values))
        codes = (self._expected(held, groups, scales, shift) + wrong).view(np.int8)
        _check_codes(codes, self.bits)
        return Codes(codes, scales, shift)

    def _expected(
        self, held: Floats, groups: Groups, scales: npt.NDArray[np.float16], shift: int
    ) -> npt.NDArray[np.uint8]:
        return nearest_codes(held, groups, scales, shift, LEVELS[self.bits]).view(np.uint8)


class Step(Full):
    """Codes of the distance to the held weights; what that leads to is rounded to codes of 8 bits.

    Args:
        bits: of a code of the distance.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(8)
        self._step = Full(bits)

    def coded_size(self, groups: Groups) -> int:
        """See `Full`."""
        return self._step.coded_size(groups) + 2 * groups.count

    def coded(self, new: Floats, held: Floats, groups: Groups) -> tuple[Numbers, bytes]:
        """See `Full`."""
        with np.errstate(over="ignore"):
            step = quantise(new - held, groups, self._step.bits)
            end = quantise(held + values_of(step, groups), groups, self.bits)
        numbers = {"shift": step.shift, "end": end.shift}
        return numbers, _scales(step) + _codes(step, self._step.bits) + _scales(end)

    def landed(self, body: memoryview, numbers: Numbers, held: Floats, groups: Groups) -> Codes:
        """See `Full`."""
        at = self._step.coded_size(groups)
        step = self._step.landed(body[:at], numbers, held, groups)
        scales, shift = _checked(body[at : self.coded_size(groups)], numbers, "end")
        with np.errstate(over="ignore"):
            moved = held + values_of(step, groups)
        return Codes(nearest_codes(moved, groups, scales, shift, LEVELS[self.bits]), scales, shift)


def _parted(layout: TensorLayout) -> tuple[TensorLayout, TensorLayout]:
    """Floats, and what is kept as it is."""
    return tuple(one for one in layout if one.dtype in FLOATS), tuple(one for one in layout if one.dtype not in FLOATS)


def _groups(floats: TensorLayout) -> Groups:
    return Groups(_count(one) for one in floats)


def _count(entry: TensorEntry) -> int:
    return int(np.prod(entry.shape, dtype=np.int64))


def _values(tensors: Tensors, floats: TensorLayout) -> Floats:
    """All values of all floats, end to end."""
    parts = [tensors[one.name].array.astype(np.float32).reshape(-1) for one in floats]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _tensors(values: Floats, floats: TensorLayout) -> dict[str, RawTensor]:
    """The reverse of `_values`, each value rounded to its tensor's dtype."""
    ends = np.cumsum([_count(one) for one in floats])
    parts = zip(floats, np.split(values, ends[:-1]), strict=True) if floats else ()
    return {one.name: _cast(part, one.dtype, one.shape) for one, part in parts}


def _cast(values: npt.NDArray[Any], dtype: str, shape: tuple[int, ...]) -> RawTensor:
    """float32 to the nearest of a dtype, ties to even; too large becomes infinity, which the caller looks for."""
    if dtype == "BF16":
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return RawTensor("BF16", shape, rounded.tobytes())
    with np.errstate(over="ignore"):
        cast = values.astype(np.float16 if dtype == "F16" else np.float32)
    return RawTensor.from_array(cast.reshape(shape))


def _scales(found: Codes) -> bytes:
    return shuffled(found.scales.view(np.uint16))


def _codes(found: Codes, bits: int) -> bytes:
    """Codes without a sign, packed."""
    return packed((found.codes.astype(np.int16) + LEVELS[bits]).astype(np.uint8), bits)


def _read_codes(body: memoryview, numbers: Numbers, groups: Groups, bits: int) -> Codes:
    at = 2 * groups.count
    scales, shift = _checked(body[:at], numbers, "shift")
    end = at + packed_size(groups.values, bits)
    codes = unpacked(body[at:end], groups.values, bits).astype(np.int16) - LEVELS[bits]
    _check_codes(codes, bits)
    return Codes(codes.astype(np.int8), scales, shift)


def _checked(body: memoryview, numbers: Numbers, name: str) -> tuple[npt.NDArray[np.float16], int]:
    shift = numbers.get(name, MOST_SHIFT + 1)
    scales = unshuffled(body, 2).view(np.float16)
    if not abs(shift) <= MOST_SHIFT or not (np.isfinite(scales) & (scales >= 0)).all():
        raise WrongContent("encoded weights have a scale that is no finite number, or out of range: refused")
    return scales, shift


def _check_codes(codes: npt.NDArray[Any], bits: int) -> None:
    if codes.size and int(np.abs(codes.astype(np.int16)).max()) > LEVELS[bits]:
        raise WrongContent(f"encoded weights have a code beyond {LEVELS[bits]}: damaged or tampered with")
