"""Who counts for how much: weights of one round's updates from the inner products of every two of them.

    G_ij = <u_i, u_j>,    |u_i - u_j|^2 = G_ii + G_jj - 2 G_ij,    aggregate = sum_k w_k u_k

An update that is a weighted sum of others needs no more than that, wherever the u_k live: in the space of factors, or
in that of products, which are never formed. Zero is "nothing changed": weights may add up to less than one.

Every function takes G (float64 [n, n], in the order of client ids), makes a new float64 tensor and knows no client.
Ties, up to rounding, go to the first in that order, so that rounding (which the basis of an update changes) decides
nothing. The rules of `federated.aggregation` that withstand hostile clients call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "bounded",
    "centered",
    "chosen",
    "distances",
    "geometric_median",
    "krum_scores",
    "nearest_mixing",
    "peeled",
]

_LEFT = 1e-14
"""A squared distance below this share of the two squared norms is what rounding left: 1e-7, as float32 has it."""
_TIE = 1e-9
"""Two values as close as this to each other are equal."""
_STILL = 1e-12
"""A step this small beside the aggregate's own size ends an iteration."""


def distances(gram: Tensor) -> Tensor:
    """``|u_i - u_j|`` of every two, float64 [n, n], zero on the diagonal and where only rounding is left."""
    squares = gram.diagonal()
    both = squares[:, None] + squares[None, :]
    found = both - 2 * gram
    return torch.where(found > _LEFT * both, found, 0.0).sqrt().fill_diagonal_(0.0)


def nearest_mixing(gram: Tensor, byzantine: int) -> Tensor:
    """Nearest-neighbour mixing: row i averages the ``n - f`` updates nearest to u_i, itself among them.

    Returns:
        float64 [n, n], rows add up to 1: the mixed updates are ``mixing @ u``, their inner products
        ``mixing @ gram @ mixing^T``.
    """
    count = len(gram) - byzantine
    order = _order(distances(gram).fill_diagonal_(-1.0))
    return torch.zeros_like(gram).scatter_(1, order[:, :count], 1.0 / count)


def krum_scores(gram: Tensor, byzantine: int) -> Tensor:
    """Sum of the squared distances to the ``n - f - 2`` nearest others (at least one, where there is one), [n]."""
    count = min(max(1, len(gram) - byzantine - 2), len(gram) - 1)
    squares = distances(gram).square().sort(dim=1).values
    return squares[:, 1 : 1 + count].sum(dim=1)


def chosen(scores: Tensor, count: int) -> Tensor:
    """Equal weights for those with the ``count`` lowest scores, zero for the others, [n]."""
    return torch.zeros_like(scores).index_fill_(0, _order(scores)[:count], 1.0 / count)


def peeled(gram: Tensor, byzantine: int, count: int) -> Tensor:
    """Indices that Krum picks one after the other, each among those that are left; rising, int64 [count]."""
    left = torch.arange(len(gram))
    taken = []
    for _ in range(count):
        best = int(_order(krum_scores(gram[left][:, left], byzantine))[0])
        taken.append(int(left[best]))
        left = torch.cat([left[:best], left[best + 1 :]])
    return torch.tensor(sorted(taken))


def bounded(gram: Tensor, bound: float) -> Tensor:
    """``w_k = min(1, bound / |u_k|) / n``, [n].

    Args:
        gram: inner products.
        bound: L2 norm; 0 takes the median of this round's norms.
    """
    norms = gram.diagonal().clamp(min=0.0).sqrt()
    return _shrunk(norms, bound) / len(gram)


def centered(gram: Tensor, radius: float, iterations: int) -> Tensor:
    """``v <- v + 1/n sum_k (u_k - v) min(1, radius / |u_k - v|)`` from ``v = 0``, [n].

    Args:
        gram: inner products.
        radius: L2 norm; 0 takes the median distance from v, anew in each iteration.
        iterations: at most that many.
    """
    weights = torch.zeros(len(gram), dtype=gram.dtype)
    for _ in range(iterations):
        pull = _shrunk(_distances_from(gram, weights), radius) / len(gram)
        moved = weights * (1 - pull.sum()) + pull
        weights, before = moved, weights
        if _is_still(gram, weights, before):
            break
    return weights


def geometric_median(gram: Tensor, smoothing: float, iterations: int) -> Tensor:
    """Smoothed Weiszfeld for ``argmin_v sum_k |u_k - v|``: ``w_k ~ 1 / max(nu, |u_k - v|)``, which add up to 1, [n].

    Args:
        gram: inner products.
        smoothing: nu in units of the smallest ball around an update that holds a majority: no minority can raise it.
        iterations: at most that many.
    """
    count = len(gram)
    majority = distances(gram).sort(dim=1).values[:, count // 2].min()
    floor = max(smoothing * float(majority), count * torch.finfo(gram.dtype).tiny)
    weights = torch.full((count,), 1.0 / count, dtype=gram.dtype)
    for _ in range(iterations):
        closeness = 1.0 / _distances_from(gram, weights).clamp(min=floor)
        weights, before = closeness / closeness.sum(), weights
        if _is_still(gram, weights, before):
            break
    return weights


def _order(values: Tensor) -> Tensor:
    """Indices by rising value along the last dimension; equal values up to rounding keep their order."""
    rising, index = values.sort(dim=-1)
    new = rising[..., 1:] - rising[..., :-1] > _TIE * rising[..., 1:]
    group = torch.cat([torch.zeros_like(index[..., :1]), new.cumsum(dim=-1)], dim=-1)
    return index.gather(-1, (group * values.shape[-1] + index).argsort(dim=-1))


def _distances_from(gram: Tensor, weights: Tensor) -> Tensor:
    """``|u_k - v|`` for ``v = sum_k w_k u_k``, [n]."""
    along = gram @ weights
    return (gram.diagonal() - 2 * along + weights @ along).clamp(min=0.0).sqrt()


def _shrunk(sizes: Tensor, bound: float) -> Tensor:
    """``min(1, bound / size)``, with the median size for a bound of 0; 1 where both are zero."""
    limit = torch.as_tensor(bound, dtype=sizes.dtype) if bound else _median(sizes)
    return torch.where(sizes > limit, limit / sizes, torch.ones_like(sizes))


def _median(sizes: Tensor) -> Tensor:
    """The upper of the two middle ones where there are two."""
    return sizes.sort().values[len(sizes) // 2]


def _is_still(gram: Tensor, weights: Tensor, before: Tensor) -> bool:
    step = weights - before
    return bool(step @ gram @ step <= _STILL**2 * (weights @ gram @ weights))
