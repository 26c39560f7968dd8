"""Weighted sums that do not depend on the order of arrival.

``weight * delta`` of a float32 delta and an integer weight below 2^29 is exact in float64. The running sum keeps
what each float64 addition rounds away (two-sum: Knuth, TAOCP 2, 4.2.2), so the result is the exact sum rounded
once, whatever the order, far below float32's resolution. Memory: two float64 copies of one update, however many arrive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from federated.errors import AggregationError, NotEnoughUpdates
from federated.state import Tensors

__all__ = ["WeightedSum"]


class WeightedSum:
    """Running ``sum_k weight_k * delta_k`` over named tensors."""

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._lost: dict[str, Tensor] = {}
        self.total_weight = 0.0
        self.count = 0

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
        self._check(delta)
        for name, tensor in delta.items():
            self._add_tensor(name, tensor.double() * weight)
        self.total_weight += weight
        self.count += 1

    def mean(self) -> dict[str, Tensor]:
        """``sum_k weight_k * delta_k / sum_k weight_k``, float64, new tensors.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        if not self.count:
            raise NotEnoughUpdates("no update to average: expected at least one good update")
        return {name: (total + self._lost[name]) / self.total_weight for name, total in self._sum.items()}

    def _check(self, delta: Tensors) -> None:
        if not delta:
            raise AggregationError("an update without tensors: expected the adapter's tensors")
        for name, tensor in delta.items():
            if not torch.isfinite(tensor).all():
                raise AggregationError(f"tensor {name} holds values that are not finite")
        if not self._sum:
            return
        if delta.keys() != self._sum.keys():
            odd = sorted(delta.keys() ^ self._sum.keys())
            raise AggregationError(f"tensor names differ from the first update's: {odd[:3]}")
        for name, tensor in delta.items():
            if tensor.shape != self._sum[name].shape:
                expected = tuple(self._sum[name].shape)
                raise AggregationError(f"tensor {name}: found shape {tuple(tensor.shape)}, expected {expected}")

    def _add_tensor(self, name: str, term: Tensor) -> None:
        old = self._sum.get(name)
        if old is None:
            self._sum[name], self._lost[name] = term, torch.zeros_like(term)
            return
        total = old + term
        shadow = total - old
        self._lost[name] += (old - (total - shadow)) + (term - shadow)
        self._sum[name] = total
