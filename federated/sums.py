"""Weighted sums that do not depend on the order of arrival, to the last bit.

``weight * delta`` of a float32 delta and an integer weight below 2^29 is exact in float64. What a float64 addition
rounds away (two-sum: Knuth, TAOCP 2, 4.2.2) goes into a next part, so that the parts together always hold the exact
sum (Shewchuk 1997, section 2); `WeightedSum.mean` rounds it once. Memory: two float64 copies of one update, and one
more for each further factor of 2^53 or so between its largest and smallest terms, however many updates arrive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from federated.errors import AggregationError, NotEnoughUpdates
from federated.state import Tensors

__all__ = ["WeightedSum"]

_LARGEST = 2.0**1000
"""Of one term: millions of them still add up within float64."""


class WeightedSum:
    """Running ``sum_k weight_k * delta_k`` over named tensors."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._total = Fraction(0)
        self.count = 0

    @property
    def total_weight(self) -> float:
        """Sum of the weights, rounded once."""
        return float(self._total)

    def add(self, delta: Tensors, weight: float) -> None:
        """Add one delta.

        Args:
            delta: finite tensors; the first one fixes names and shapes.
            weight: finite and > 0.

        Raises:
            AggregationError: for a bad weight, other names or shapes, or values that are not finite; nothing is added.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise AggregationError(f"weight {weight} of an update: expected a finite number > 0")
        terms = {name: tensor.double() * weight for name, tensor in delta.items()}
        self._check(terms)
        for name, term in terms.items():
            _grow(self._parts.setdefault(name, []), term)
        self._total += Fraction(weight)
        self.count += 1

    def mean(self) -> dict[str, Tensor]:
        """``sum_k weight_k * delta_k / sum_k weight_k``, float64, new tensors.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        if not self.count:
            raise NotEnoughUpdates("no update to average: expected at least one good update")
        return {name: tensor / self.total_weight for name, tensor in self.total().items()}

    def total(self) -> dict[str, Tensor]:
        """``sum_k weight_k * delta_k``, float64, new tensors; empty when nothing was added."""
        return {name: _rounded(parts) for name, parts in self._parts.items()}

    def _check(self, terms: Tensors) -> None:
        if not terms:
            raise AggregationError("an update without tensors: expected the adapter's tensors")
        for name, term in terms.items():
            if not float(term.abs().max()) < _LARGEST:  # not a NaN either
                raise AggregationError(f"tensor {name} holds values that are not finite")
        if not self._parts:
            return
        if terms.keys() != self._parts.keys():
            odd = sorted(terms.keys() ^ self._parts.keys())
            raise AggregationError(f"tensor names differ from the first update's: {odd[:3]}")
        for name, term in terms.items():
            expected = tuple(self._parts[name][0].shape)
            if term.shape != expected:
                raise AggregationError(f"tensor {name}: found shape {tuple(term.shape)}, expected {expected}")


def _two_sum(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``left + right`` rounded, and exactly what rounding lost."""
    total = left + right
    shadow = total - left
    return total, (left - (total - shadow)) + (right - shadow)


def _grow(parts: list[Tensor], term: Tensor) -> None:
    """Add a term to a sum in parts, in place and exactly; a new part is made when something is left over."""
    for index, part in enumerate(parts):
        parts[index], term = _two_sum(part, term)
        if not term.any():
            return
    parts.append(term)


def _rounded(parts: Sequence[Tensor]) -> Tensor:
    """The exact sum of the parts, rounded once to nearest (ties to even); a new tensor."""
    first, *others = _distilled(parts)
    tail = torch.zeros_like(first)
    for part in reversed(others):
        tail = _to_odd(part, tail)
    return first + tail


def _distilled(parts: Sequence[Tensor]) -> list[Tensor]:
    """The same sum in parts of which each is at most half a unit in the last place of the one before."""
    clean, moved = list(parts), len(parts) > 1
    while moved:
        moved = False
        for index in range(len(clean) - 1, 0, -1):
            upper, lower = _two_sum(clean[index - 1], clean[index])
            moved |= not torch.equal(upper, clean[index - 1])
            clean[index - 1], clean[index] = upper, lower
    return clean


def _to_odd(part: Tensor, tail: Tensor) -> Tensor:
    """``part + tail`` rounded to odd, so that the next rounding sees no tie where there is none (Boldo 2008)."""
    total, lost = _two_sum(part, tail)
    inexact_even = (lost != 0) & ((total.view(torch.int64) & 1) == 0)
    return torch.where(inexact_even, torch.nextafter(total, lost * math.inf), total)
