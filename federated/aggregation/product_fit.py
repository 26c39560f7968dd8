"""How LoRA-FAIR corrects B under a fixed A, so that the product comes close to a target that neither of them made.

    ridge    dB = argmin  ||T - (B + dB) A||^2 + strength * ||dB||^2
    cosine   dB = argmin  1 - cos(T, (B + dB) A) + strength * ||dB||^2

T is a low-rank matrix and never formed: both need only ``T A^T`` and ``A A^T``. Pure algebra in float64; used by
`federated.aggregation.lora_fair`, which says where it is from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from federated.lowrank import LowRank, norm_of

__all__ = ["by_cosine", "by_ridge"]

_VANISHED = 1e-3
"""A product this much shorter than that of the means is no minimum, but on its way to zero."""


def by_ridge(target: LowRank, factor_a: Tensor, factor_b: Tensor, *, strength: float) -> Tensor:
    """``(T - B A) A^T (A A^T + strength I)^-1``, float64 [d_out, r].

    With strength 0 it is the least-squares solution, the smallest one where there are many.

    Args:
        target: T, d_out x d_in.
        factor_a: A, float64 [r, d_in].
        factor_b: B, float64 [d_out, r].
        strength: lambda, not negative.
    """
    gram = factor_a @ factor_a.T
    missing = target.left @ (target.right @ factor_a.T) - factor_b @ gram
    values, vectors = torch.linalg.eigh(gram)
    least = 1e-12 * values[-1].clamp(min=0.0)
    inverse = torch.where(values > least, 1.0 / (values.clamp(min=0.0) + strength), 0.0)
    found: Tensor = ((missing @ vectors) * inverse) @ vectors.T
    return found


def by_cosine(target: LowRank, factor_a: Tensor, factor_b: Tensor, *, strength: float) -> Tensor:
    """The dB, float64 [d_out, r], at a minimum of ``1 - cos(T, (B + dB) A) + strength * ||dB||^2``.

    A T of zero, or one across all rows of A, has no direction to turn to: dB is zero then. It is zero, too, where T
    points away from B A and the objective has no minimum: it only falls as ``B + dB`` vanishes, whose length a cosine
    does not see. The search starts from dB = 0, or where B A is zero from the ridge solution, and never ends above it.

    Args:
        target: T, d_out x d_in.
        factor_a: A, float64 [r, d_in].
        factor_b: B, float64 [d_out, r].
        strength: lambda, not negative.
    """
    size = norm_of(target)
    cross = target.left @ (target.right @ factor_a.T)
    if not size or not cross.any():
        return torch.zeros_like(factor_b)
    values, vectors = torch.linalg.eigh(factor_a @ factor_a.T)
    turned, aim = factor_b @ vectors, (cross / size) @ vectors
    family = _Family(turned, aim, values.clamp(min=0.0), strength)
    start = turned
    if family.length(start) <= 1e-12 * float(values[-1].clamp(min=0.0).sqrt()) * float(aim.norm()):
        start = turned + by_ridge(target, factor_a, factor_b, strength=strength) @ vectors
    found: Tensor = (family.minimum(start) - turned) @ vectors.T
    return found


class _Family:
    """The points where the cosine objective may have a minimum: two numbers, whatever the layer's size.

    With ``X = B + dB``, ``G = A A^T`` and ``H = T A^T / ||T||`` the objective is

        1 - <H, X> / ||X||_G + strength * ||X - B||^2,    ||X||_G^2 = <X G, X>

    and where its slope is zero, ``X = (2 strength B + u H) (2 strength I + v G)^-1`` with ``u = 1 / ||X||_G`` and
    ``v = <H, X> u^3``. In G's eigenbasis that is a mix of one column of B and one of H each, so that u and v can be
    searched with r numbers in hand.

    Args:
        origin: B in the eigenbasis, float64 [d_out, r].
        aim: H in the eigenbasis, float64 [d_out, r].
        gram: G's eigenvalues, float64 [r], not negative.
        strength: lambda.
    """

    def __init__(self, origin: Tensor, aim: Tensor, gram: Tensor, strength: float) -> None:
        self._origin, self._aim, self._gram, self._double = origin, aim, gram, 2.0 * strength
        self._idle = gram <= 1e-12 * gram.max()
        self._top = float(gram.max())
        self._squares = origin.square().sum(0), (origin * aim).sum(0), aim.square().sum(0)

    def length(self, point: Tensor) -> float:
        """``||X||_G``."""
        return float((point.square().sum(0) * self._gram).sum().sqrt())

    def minimum(self, start: Tensor) -> Tensor:
        """A minimum, from the member of the family that the start's length and cosine give; never above B itself."""
        length = self.length(start)
        u, v = 1.0 / length, float((self._aim * start).sum()) / length**3
        least = 1e-3 * (self._double + self._top * u**2)
        place = torch.tensor([u, max(self._double + self._top * v, least)], dtype=torch.float64).log()
        mixes = self._polished(self._searched(place))
        found = self._origin * mixes[0] + self._aim * mixes[1]
        whole, nothing = torch.ones_like(self._gram), torch.zeros_like(self._gram)
        worse = self._value(*mixes) > self._value(whole, nothing)  # not so where B has no direction: that is no number
        vanished = self.length(found) < _VANISHED * self.length(self._origin)
        return self._origin if worse or vanished or not torch.isfinite(found).all() else found

    def _mixes(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """How much of each column of B and of H is in X at ``log u`` and ``log (2 strength + v max G)``."""
        share = self._gram / self._top
        below = self._double * (1.0 - share) + place[1].exp() * share
        below = torch.where(self._idle, 1.0, below)
        return torch.where(self._idle, 1.0, self._double / below), torch.where(self._idle, 0.0, place[0].exp() / below)

    def _parts(self, ours: Tensor, aims: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``<H, X>``, ``||X||_G`` and ``||X - B||^2`` of a mix."""
        own, cross, aim = self._squares
        inner = (ours * cross + aims * aim).sum()
        length = (self._gram * (ours**2 * own + 2 * ours * aims * cross + aims**2 * aim)).sum().sqrt()
        moved = ours - 1.0
        return inner, length, (moved**2 * own + 2 * moved * aims * cross + aims**2 * aim).sum()

    def _value(self, ours: Tensor, aims: Tensor) -> Tensor:
        inner, length, moved = self._parts(ours, aims)
        return 1.0 - inner / length + self._double / 2 * moved

    def _searched(self, place: Tensor) -> Tensor:
        point = place.clone().requires_grad_()
        search = torch.optim.LBFGS(
            [point], max_iter=100, tolerance_grad=1e-13, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            search.zero_grad()
            value = self._value(*self._mixes(point))
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            search.step(closure)  # type: ignore[no-untyped-call]
        return point.detach()

    def _polished(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Where the objective is flat to the last bit, u and v as the mix itself gives them still come nearer."""
        mixes = self._mixes(place)
        for _ in range(50):
            inner, length, _ = self._parts(*mixes)
            top = self._double + self._top * inner / length**3
            if not (top > 0 and torch.isfinite(top)):
                break
            place = torch.stack([-length.log(), top.log()])
            better = self._mixes(place)
            settled = all(torch.allclose(one, other, rtol=1e-13) for one, other in zip(mixes, better, strict=True))
            mixes = better
            if settled:
                break
        return mixes
