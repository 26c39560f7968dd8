"""Numbers as small whole multiples of a scale: 64 neighbours of one tensor share one, kept as float16.

    value = code * (scale * 2**shift)

The product has at most 19 significant bits and stays away from the ends of float32's range, so it is exact: the same
bits on every machine, in whatever order. Symmetric: zero is a code, and there is no offset (measured: an offset costs
a second number for each group, and gains less than it costs). How scales are chosen is the sender's business alone;
`values_of` only multiplies. Called by the codecs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from federated.errors import ReleaseError

__all__ = ["GROUP", "LEVELS", "MOST_SHIFT", "Codes", "Groups", "nearest_codes", "quantise", "values_of"]

GROUP = 64
"""Neighbours in one tensor that share a scale; a tensor's last group may be shorter."""

LEVELS = {2: 1, 4: 7, 8: 127}
"""By bits: the largest code; the smallest is its negative."""

MOST_SHIFT = 100
"""With more, products would leave the range in which float32 is exact everywhere."""

_STEPS = 24
Floats = npt.NDArray[np.float32]


class Groups:
    """How a row of tensors, laid end to end, falls into groups.

    Args:
        sizes: values in each tensor, all positive.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        lengths = [[min(GROUP, size - at) for at in range(0, size, GROUP)] for size in sizes]
        self.lengths = np.array([one for lengths_of in lengths for one in lengths_of], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]) if self.lengths.size else self.lengths
        self.values = int(self.lengths.sum())

    @property
    def count(self) -> int:
        """Number of groups."""
        return int(self.lengths.size)

    def spread(self, one_each: npt.NDArray[np.float32]) -> Floats:
        """One number for each group, repeated for each of its values."""
        return np.repeat(one_each, self.lengths)

    def sums(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum over each group."""
        return np.add.reduceat(values, self.starts)

    def largest(self, values: Floats) -> Floats:
        """Largest magnitude in each group."""
        return np.maximum.reduceat(np.abs(values), self.starts)


@dataclass(frozen=True)
class Codes:
    """What stands for values.

    Args:
        codes: int8, one for each value.
        scales: float16, one for each group; not negative.
        shift: power of two that all scales are multiplied by.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]
    shift: int


def values_of(found: Codes, groups: Groups) -> Floats:
    """What codes stand for: exact products, in float32."""
    return found.codes.astype(np.float32) * groups.spread(_true(found.scales, found.shift))


def quantise(values: Floats, groups: Groups, bits: int) -> Codes:
    """The codes that come nearest, with the scale of each group that loses least.

    Of the scales that send a group's largest value to the largest code, or clip it, the one with the least squared
    error is taken; in few bits that is far from the largest value (with two it is half of it).

    Args:
        values: finite float32.
        groups: of these values.
        bits: one of `LEVELS`.

    Raises:
        ReleaseError: if values are too large for such scales; far too small ones become zero.
    """
    most = LEVELS[bits]
    largest = groups.largest(values) if groups.count else np.zeros(0, dtype=np.float32)
    top = float(largest.max(initial=0.0))
    shift = int(np.frexp(top / most)[1]) - 15 if top else 0
    if not (np.isfinite(top) and shift <= MOST_SHIFT):
        raise ReleaseError(f"values of {top:g} cannot be quantised to {bits} bits; ship them without loss")
    shift = max(shift, -MOST_SHIFT)
    best = _scales(largest / np.float32(most), shift)
    least = _error(values, groups, _at(values, groups, best, shift, most))
    for step in range(1, _STEPS if groups.count else 0):
        tried = _scales(largest / np.float32(most) * np.float32(1 - step / (_STEPS + 4 * most)), shift)
        error = _error(values, groups, _at(values, groups, tried, shift, most))
        better = error < least
        best, least = np.where(better, tried, best), np.where(better, error, least)
    return _at(values, groups, best, shift, most)


def nearest_codes(
    values: Floats, groups: Groups, scales: npt.NDArray[np.float16], shift: int, most: int
) -> npt.NDArray[np.int8]:
    """The nearest codes under given scales; the same on every machine, for whatever finite values.

    Args:
        values: float32.
        groups: of these values.
        scales: as in `Codes`.
        shift: as in `Codes`.
        most: the largest code.
    """
    true = groups.spread(_true(scales, shift))
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.divide(values, true, out=np.zeros_like(values), where=true > 0)
    return np.clip(np.rint(steps), -most, most).astype(np.int8)


def _at(values: Floats, groups: Groups, scales: npt.NDArray[np.float16], shift: int, most: int) -> Codes:
    return Codes(nearest_codes(values, groups, scales, shift, most), scales, shift)


def _error(values: Floats, groups: Groups, found: Codes) -> npt.NDArray[np.float64]:
    return groups.sums(np.square(values - values_of(found, groups), dtype=np.float64))


def _scales(wanted: Floats, shift: int) -> npt.NDArray[np.float16]:
    return np.ldexp(wanted, -shift).astype(np.float16)


def _true(scales: npt.NDArray[np.float16], shift: int) -> Floats:
    return np.ldexp(scales.astype(np.float32), shift)
