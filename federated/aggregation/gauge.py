"""One basis for everybody's factors: what a client sends counts for its product alone, whatever basis it chose.

    s B A = U S V^T,    A~ = S^1/2 V^T,    B~ = U S^1/2          balanced: A~ A~^T = B~^T B~
    M = A_0 A~^T + B_0^T B~ = X T Y^T,     Q = X Y^T             Procrustes: the turn towards (A_0, B_0)
    canonical pair = (Q A~, B~ Q^T)

``(B, A)``, ``(-B, -A)``, ``(B Q, Q^T A)`` and ``(B / c, c A)`` have one product, so they have one canonical pair: a
hostile client gains nothing from the choice, and honest ones that drifted apart in basis alone agree again. The scaling
is in the pair, so that layers of different scalings are measured alike.

``(A_0, B_0)`` is the balanced form of what all clients received. Layers whose product has fewer directions than the
rank (a fresh adapter: B = 0) have rows of zeros there, in both factors: a client that learnt nothing has the same
zeros, so its update is zero. Only the turn needs a hint in those directions, and takes the rows of A that the
received adapter has, as far as they are new; honest clients share them. Where a client's product has no part in common
with them, the turn is whatever the decomposition of M gives: the same for every basis up to rounding, not unique.

Schoenemann, "A generalized solution of the orthogonal Procrustes problem", 1966. Works on single layers, in float64;
knows no clients. `federated.aggregation.spaces` calls it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from federated.lowrank import LowRank, Spectrum, balanced_factors, decompose, effective
from federated.residual import used_rank
from federated.state import LoraPair

__all__ = ["Frame", "frame_of"]


@dataclass(frozen=True)
class Frame:
    """The received form of one layer, which every client's form of it is turned towards.

    Args:
        factor_a: float64 [rank, d_in], balanced, zero where the product has no direction.
        factor_b: float64 [d_out, rank], the same.
        guide: float64 [rank, d_in], ``factor_a`` with the received rows of A where it is zero.
    """

    factor_a: Tensor
    factor_b: Tensor
    guide: Tensor

    def canonical(self, product: LowRank) -> tuple[Tensor, Tensor]:
        """The factors of a product in this frame, float64, with ``factor_b @ factor_a`` the product.

        Args:
            product: effective update of at most this frame's rank.

        Raises:
            AggregationError: for values that are not finite.
        """
        factor_a, factor_b = _balanced(decompose(product), rank=len(self.factor_a))
        towards = self.guide @ factor_a.T + self.factor_b.T @ factor_b
        left, _, right = torch.linalg.svd(towards)
        turn = left @ right
        return turn @ factor_a, factor_b @ turn.T


def frame_of(received: LoraPair) -> Frame:
    """The frame of a layer as the clients received it."""
    rank, found = received.factor_a.shape[0], decompose(effective(received))
    factor_a, factor_b = _balanced(found, rank=rank)
    used, guide = min(rank, used_rank(found)), factor_a.clone()
    guide[used:] = _new_rows(received.factor_a.double()[used:], found, used)
    return Frame(factor_a, factor_b, guide)


def _balanced(found: Spectrum, *, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors, zero in directions that only rounding left."""
    factor_a, factor_b = balanced_factors(found, rank=rank, scaling=1.0)
    used = used_rank(found)
    factor_a[used:], factor_b[:, used:] = 0.0, 0.0
    return factor_a, factor_b


def _new_rows(rows: Tensor, found: Spectrum, used: int) -> Tensor:
    """What of these rows is not in the product's own row space, never larger than its smallest direction.

    A client that learnt nothing must be turned by nothing, and the product's own directions come first.
    """
    if not used or not len(rows):
        return rows
    basis = found.v[:, :used]
    new = rows - (rows @ basis) @ basis.T
    largest = new.norm(dim=1).max()
    return new * (found.s[used - 1].sqrt() / largest) if largest > 0 else new
