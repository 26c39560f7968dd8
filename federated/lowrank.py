"""Algebra on low-rank products that never forms the product.

A `LowRank` stands for the ``d_out x d_in`` matrix ``left @ right`` (``left`` is d_out x k, ``right`` is k x d_in), with
any scaling already multiplied in. For LoRA, ``left = scaling * factor_b`` and ``right = factor_a``: the effective
update. A weighted sum of such products is a product of stacked factors, exactly:

    sum_k w_k L_k R_k  =  [w_1 L_1 | w_2 L_2 | ...] @ [R_1 ; R_2 ; ...]

and its best approximation of rank r (Eckart and Young 1936) comes from two thin QR factorisations and one SVD of a
k x k core:

    left = Q_l T_l,   right^T = Q_r T_r,   T_l T_r^T = U S V^T,   truncated = (Q_l U_r) S_r (Q_r V_r)^T

Cost O((d_out + d_in) k^2 + k^3) in place of O(d_out d_in min(d_out, d_in)); nothing is gained where the stacked rank k
reaches min(d_out, d_in). All in float64, on the CPU, with a fixed sign convention: the same input gives the same bits.

The rules of `federated.aggregation` that work on products call it; it knows no names and no clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from federated.errors import AggregationError
from federated.state import LoraPair

__all__ = [
    "LowRank",
    "Spectrum",
    "Streamed",
    "balanced_factors",
    "decompose",
    "effective",
    "gram",
    "inner",
    "norm_of",
    "rank_for_energy",
    "sketch",
    "stack",
    "sum_of",
    "sum_streaming",
    "truncate",
]


@dataclass(frozen=True)
class LowRank:
    """The matrix ``left @ right``, never formed.

    Args:
        left: float64 [d_out, k].
        right: float64 [k, d_in].
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        """Check that the two fit.

        Raises:
            AggregationError: if they are no matrices, or their inner sizes differ.
        """
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            found = f"{tuple(self.left.shape)} and {tuple(self.right.shape)}"
            raise AggregationError(f"factors of a product do not fit: expected d_out x k and k x d_in, found {found}")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def stacked_rank(self) -> int:
        """Columns of ``left``: no less than the product's rank."""
        return self.left.shape[1]

    def scaled(self, weight: float) -> LowRank:
        """``weight`` times the matrix; ``right`` is shared."""
        return LowRank(self.left * weight, self.right)

    def dense(self) -> Tensor:
        """The product itself, float64 [d_out, d_in]: for tests and small layers only."""
        return self.left @ self.right


@dataclass(frozen=True)
class Spectrum:
    """A thin singular value decomposition ``u @ diag(s) @ v^T`` of a low-rank matrix.

    Args:
        u: float64 [d_out, n], orthonormal columns.
        s: float64 [n], falling, not negative; n = min(k, d_out, d_in).
        v: float64 [d_in, n], orthonormal columns.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def energy(self) -> float:
        """Sum of the squared singular values: the squared Frobenius norm."""
        return float(self.s.square().sum())

    def kept(self, rank: int) -> float:
        """Share of the energy in the first ``rank`` directions, in [0, 1]; 1 for the zero matrix."""
        return float(self.s[:rank].square().sum()) / self.energy if self.energy else 1.0


def effective(pair: LoraPair) -> LowRank:
    """The effective update ``scaling * factor_b @ factor_a`` of one adapted layer, as d_out x d_in.

    A Conv1D layer (``fan_in_fan_out``) stores its weight transposed; its factors are still ``rank x d_in`` and
    ``d_out x rank``, so nothing is transposed here.
    """
    return LowRank(pair.factor_b.double() * pair.scaling, pair.factor_a.double())


def stack(products: Sequence[LowRank]) -> LowRank:
    """Their sum, exactly, as one product of stacked factors.

    Raises:
        AggregationError: for none, or for different shapes.
    """
    if not products:
        raise AggregationError("no product to add up: expected at least one")
    shapes = {product.shape for product in products}
    if len(shapes) > 1:
        raise AggregationError(f"products of different shapes cannot be added up: {sorted(shapes)[:3]}")
    left = torch.cat([product.left for product in products], dim=1)
    return LowRank(left, torch.cat([product.right for product in products], dim=0))


def sum_of(terms: Iterable[tuple[float, LowRank]]) -> LowRank:
    """``sum_k weight_k * product_k`` in stacked form.

    Raises:
        AggregationError: as `stack`.
    """
    return stack([product.scaled(weight) for weight, product in terms])


@dataclass(frozen=True)
class Streamed:
    """A sum that was folded on the way.

    Args:
        product: the sum.
        lost: Frobenius norm, at most, of what was cut off; 0 where nothing was.
    """

    product: LowRank
    lost: float


def sum_streaming(terms: Iterable[tuple[float, LowRank]], *, bound: int | None = None) -> Streamed:
    """`sum_of` in bounded memory: when the stacked columns pass a bound, they are folded into half as many.

    Folding keeps the closest matrix of that rank, by `decompose`. Where half of the bound is the matrix's smaller side,
    as it is by default, there are no more directions than that and nothing is lost but rounding. Other orders of the
    terms round differently: give them in a canonical one.

    Args:
        terms: weights and products, taken one at a time.
        bound: most columns that are held, one term aside; default: twice the smaller side.

    Raises:
        AggregationError: as `stack`; for a bound below 2, or values that are not finite.
    """
    held: list[LowRank] = []
    lost = 0.0
    for weight, product in terms:
        most = 2 * min(product.shape) if bound is None else bound
        if most < 2:
            raise AggregationError(f"a bound of {most} columns on a sum: expected at least 2")
        held.append(product.scaled(weight))
        if sum(one.stacked_rank for one in held) > most:
            folded, cut = _folded(stack(held), most // 2)
            held, lost = [folded], lost + cut
    return Streamed(stack(held), lost)


def _folded(product: LowRank, rank: int) -> tuple[LowRank, float]:
    """The closest matrix of that rank, and the norm of the rest."""
    found = decompose(product)
    kept = LowRank(found.u[:, :rank] * found.s[:rank], found.v[:, :rank].T.contiguous())
    return kept, float(found.s[rank:].norm())


def decompose(product: LowRank) -> Spectrum:
    """Singular value decomposition from the factors alone.

    Each singular pair's sign is fixed so that the largest entry of its ``u`` column is positive: the result does not
    depend on the sign that LAPACK happens to give.

    Raises:
        AggregationError: for values that are not finite.
    """
    if not (torch.isfinite(product.left).all() and torch.isfinite(product.right).all()):
        raise AggregationError("the factors hold values that are not finite")
    q_left, t_left = torch.linalg.qr(product.left)
    q_right, t_right = torch.linalg.qr(product.right.T)
    u, s, vh = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
    left, right = q_left @ u, q_right @ vh.T
    signs = _signs(left)
    return Spectrum(left * signs, s, right * signs)


def sketch(product: LowRank, rank: int, *, generator: torch.Generator, oversample: int = 8, power: int = 1) -> Spectrum:
    """The leading part of a decomposition from a random sample of the range (Halko, Martinsson and Tropp 2011, 5.1).

    Y = (M M^T)^power M Omega with a Gaussian Omega of ``rank + oversample`` columns, Q = qr(Y), and the decomposition
    of Q Q^T M. Cheaper than `decompose` where ``rank`` is much smaller than the stacked rank, and not the optimum: the
    error it adds is small where the singular values fall quickly.

    Args:
        product: what to decompose.
        rank: directions that are wanted; as many are given, or fewer if there are no more.
        generator: draws Omega.
        oversample: further columns of Omega.
        power: passes that sharpen the falling of the singular values.

    Raises:
        AggregationError: for a rank below 1.
    """
    if rank < 1:
        raise AggregationError(f"rank {rank} of a sketch: expected at least 1")
    columns = min(rank + oversample, *product.shape)
    omega = torch.randn(product.shape[1], columns, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(product.left @ (product.right @ omega)).Q
    for _ in range(power):
        other = torch.linalg.qr(product.right.T @ (product.left.T @ basis)).Q
        basis = torch.linalg.qr(product.left @ (product.right @ other)).Q
    found = decompose(LowRank(basis, (basis.T @ product.left) @ product.right))
    return Spectrum(found.u[:, :rank], found.s[:rank], found.v[:, :rank])


def _signs(columns: Tensor) -> Tensor:
    largest = columns.abs().argmax(dim=0, keepdim=True)
    found = torch.sign(columns.gather(0, largest)).squeeze(0)
    return torch.where(found == 0, torch.ones_like(found), found)


def truncate(product: LowRank, rank: int) -> LowRank:
    """The closest matrix of at most that rank, as a product with ``left`` carrying the singular values.

    Raises:
        AggregationError: for a rank below 1, or values that are not finite.
    """
    if rank < 1:
        raise AggregationError(f"rank {rank} of a truncation: expected at least 1")
    found = decompose(product)
    return LowRank(found.u[:, :rank] * found.s[:rank], found.v[:, :rank].T.contiguous())


def balanced_factors(found: Spectrum, *, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """``factor_a`` (rank x d_in) and ``factor_b`` (d_out x rank) with ``scaling * factor_b @ factor_a`` the truncation.

    The singular values are shared evenly (``sqrt(s / scaling)`` on each side), so that both factors train at like
    pace. Where the matrix has fewer directions than ``rank``, the rest is zero.
    """
    root = (found.s[:rank] / scaling).sqrt()
    count = len(root)
    factor_a = torch.zeros(rank, found.v.shape[0], dtype=torch.float64)
    factor_b = torch.zeros(found.u.shape[0], rank, dtype=torch.float64)
    factor_a[:count] = root[:, None] * found.v[:, :rank].T
    factor_b[:, :count] = found.u[:, :rank] * root
    return factor_a, factor_b


def rank_for_energy(found: Spectrum, energy: float) -> int:
    """The smallest rank (at least 1) that keeps at least that share of the energy.

    Args:
        found: singular values.
        energy: share in (0, 1].
    """
    total = found.s.square().cumsum(0)
    if not len(total) or not total[-1]:
        return 1
    enough = total >= energy * total[-1] * (1 - 1e-12)
    return int(enough.nonzero()[0]) + 1


def inner(one: LowRank, other: LowRank) -> float:
    """Frobenius inner product of two matrices: ``trace(one^T other)`` by way of k x k cores.

    Raises:
        AggregationError: for different shapes.
    """
    if one.shape != other.shape:
        raise AggregationError(f"products of shapes {one.shape} and {other.shape} have no inner product")
    return float(((one.left.T @ other.left) * (one.right @ other.right.T)).sum())


def gram(products: Sequence[LowRank]) -> Tensor:
    """`inner` of every two matrices, float64 [n, n] and exactly symmetric: one row of cores in memory at a time.

    Raises:
        AggregationError: for none, or for different shapes.
    """
    every = stack(products)
    sizes = [product.stacked_rank for product in products]
    rows = []
    for product in products:
        cores = (product.left.T @ every.left) * (product.right @ every.right.T)
        rows.append(torch.stack([part.sum() for part in torch.split(cores.sum(dim=0), sizes)]))
    found = torch.stack(rows)
    return (found + found.T) / 2


def norm_of(product: LowRank) -> float:
    """Frobenius norm, by QR of both factors: exact also where terms cancel."""
    t_left = torch.linalg.qr(product.left, mode="r").R
    t_right = torch.linalg.qr(product.right.T, mode="r").R
    return math.sqrt(float((t_left @ t_right.T).square().sum()))
