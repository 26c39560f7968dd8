"""What a rule adds to a client's training loss, by its gradient alone: the loss that is reported stays the task's.

`federated.training` makes one from the plan and adds its gradient before each step. Live parameters in, nothing out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from federated.manifest import TrainPlan

__all__ = ["TailPenalty", "tail_penalty"]

_A, _B = ".factor_a", ".factor_b"


class TailPenalty:
    """``weight * sum_l ||B_l[:, start:]|| * ||A_l[start:]||`` over all adapted layers l, with Frobenius norms.

    It draws to zero the rows of A, and the columns of B, that a truncation to rank ``start`` would cut off. Where one
    of the norms is zero its side has no slope.

    Args:
        parameters: canonical name to live parameter; layers with only one of the two factors are left out.
        start: first row of the tail; a layer of no higher rank has none.
        weight: not negative.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, start: int, weight: float) -> None:
        layers = [name.removesuffix(_A) for name in parameters if name.endswith(_A)]
        self._pairs = [(parameters[n + _A], parameters[n + _B]) for n in layers if n + _B in parameters]
        self._start = start
        self._weight = weight

    @torch.no_grad()
    def value(self) -> float:
        """The penalty now."""
        return self._weight * sum(float(left.norm() * right.norm()) for left, right in map(self._tails, self._pairs))

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add its gradient to the parameters' own."""
        for factor_a, factor_b in self._pairs:
            rows, columns = self._tails((factor_a, factor_b))
            size_a, size_b = rows.norm(), columns.norm()
            _pull(factor_a.grad, slice(self._start, None), rows, self._weight * size_b / size_a)
            _pull(factor_b.grad, (slice(None), slice(self._start, None)), columns, self._weight * size_a / size_b)

    def _tails(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0][self._start :], pair[1][:, self._start :]


def _pull(gradient: Tensor | None, place: slice | tuple[slice, slice], tail: Tensor, factor: Tensor) -> None:
    if gradient is not None and torch.isfinite(factor):  # not where the tail is empty or zero
        gradient[place] += factor.to(gradient.dtype) * tail


def tail_penalty(plan: TrainPlan, parameters: Mapping[str, nn.Parameter]) -> TailPenalty | None:
    """The penalty that a plan asks for, if any."""
    if not plan.tail_penalty:
        return None
    return TailPenalty(parameters, start=plan.tail_start, weight=plan.tail_penalty)
