"""Where the updates of one round are compared and combined: among factors in one basis, or among products.

    factor    u_k = (A~_k - A~_0, B~_k - B~_0) of each layer in the canonical gauge (`federated.aggregation.gauge`), and
              the dense tensors' deltas; any statistic of the coordinates can be taken
    product   u_k = s B_k A_k - s B_0 A_0 = s (dB_k A_k + B_0 dA_k) of each layer, and the dense tensors' deltas;
              weighted sums alone, by way of inner products, because the d x d product is never formed

Either way u_k depends on what a client's product is and not on its basis. A layer's next product is that of the
server's master copy plus the combined change, and its factors are the closest of the adapter's rank: a bfloat16 adapter
loses no small step. Updates wait on disk; in memory is one layer of all clients.

`federated.aggregation.robust` is the only caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from federated.aggregation.gauge import frame_of
from federated.aggregation.spool import Spool
from federated.delta import is_finite
from federated.errors import AggregationError
from federated.lowrank import LowRank, effective, gram, stack
from federated.state import AdapterState, LoraPair, Tensors

__all__ = ["Combination", "FactorSpace", "ProductSpace", "Space"]


@dataclass(frozen=True)
class Combination:
    """How many updates become one.

    Args:
        reduce: float64 [n, ...] to float64 [...], for each tensor of the updates in turn.
        weights: float64 [n], where it is a weighted sum; None for statistics of the coordinates.
        metrics: what the rule reports of it.
    """

    reduce: Callable[[Tensor], Tensor]
    weights: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def weighted(cls, weights: Tensor, **metrics: float) -> Combination:
        """``sum_k w_k u_k``; reports how many have no weight, and the smallest in units of an equal share."""
        shares = {"filtered_out": float((weights == 0).sum()), "least_share": float(weights.min()) * len(weights)}
        return cls(lambda every: torch.tensordot(weights, every, dims=1), weights, {**metrics, **shares})

    def of_mixed(self, mixing: Tensor) -> Combination:
        """The same of ``mixing @ u`` in place of u."""
        if self.weights is not None:
            return Combination.weighted(mixing.T @ self.weights, **self.metrics)
        return Combination(lambda every: self.reduce(torch.tensordot(mixing, every, dims=1)), None, self.metrics)


class Space(Protocol):
    """One round's updates, as points."""

    spool: Spool

    def encode(self, after: AdapterState, delta: Tensors) -> Tensors:
        """What is kept of an update, float32, under the adapter's names and in its shapes."""
        ...

    def gram(self) -> Tensor:
        """Inner products of every two updates over all layers and dense tensors, float64 [n, n]."""
        ...

    def change(self, pair: LoraPair, how: Combination) -> LowRank:
        """What becomes of one received layer's product, as a change of it."""
        ...


def _gram_of(spool: Spool, names: list[str]) -> Tensor:
    """Inner products over some tensors."""
    count = len(spool.client_ids)
    total = torch.zeros(count, count, dtype=torch.float64)
    for name in names:
        flat = spool.stacked(name).reshape(count, -1)
        total += flat @ flat.T
    return (total + total.T) / 2


class FactorSpace:
    """Factors in the gauge of what was received.

    Args:
        received: what all clients were sent.
    """

    def __init__(self, received: AdapterState) -> None:
        self.spool = Spool()
        self._received = received
        self._frames = {pair.module.name: frame_of(pair) for pair in received.pairs()}

    def encode(self, after: AdapterState, delta: Tensors) -> Tensors:
        """Canonical factors less the received ones, and the dense tensors' deltas.

        Raises:
            AggregationError: for an update beyond float32.
        """
        kept = {name: delta[name] for name in self._received.dense()}
        for pair in after.pairs():
            name, frame = pair.module.name, self._frames[pair.module.name]
            factor_a, factor_b = frame.canonical(effective(pair))
            kept[f"{name}.factor_a"] = (factor_a - frame.factor_a).float()
            kept[f"{name}.factor_b"] = (factor_b - frame.factor_b).float()
        if not is_finite(kept):
            raise AggregationError("the update's balanced factors hold values that are not finite")
        return kept

    def gram(self) -> Tensor:
        """Inner products of factors and dense deltas."""
        return _gram_of(self.spool, sorted(self._received.tensors))

    def change(self, pair: LoraPair, how: Combination) -> LowRank:
        """The product of the combined factors, less the received one."""
        name, frame = pair.module.name, self._frames[pair.module.name]
        factor_a = frame.factor_a + how.reduce(self.spool.stacked(f"{name}.factor_a"))
        factor_b = frame.factor_b + how.reduce(self.spool.stacked(f"{name}.factor_b"))
        return stack([LowRank(factor_b, factor_a), effective(pair).scaled(-1.0)])


class ProductSpace:
    """Effective updates, as they differ from what was received.

    Args:
        received: what all clients were sent.
    """

    def __init__(self, received: AdapterState) -> None:
        self.spool = Spool()
        self._received = received

    def encode(self, after: AdapterState, delta: Tensors) -> Tensors:  # noqa: ARG002 - the other space's signature
        """The update itself."""
        return delta

    def gram(self) -> Tensor:
        """Inner products of products and dense deltas."""
        total = _gram_of(self.spool, sorted(self._received.dense()))
        for pair in self._received.pairs():
            before = effective(pair)
            changes = [
                LowRank(torch.cat([moved_b, before.left], dim=1), torch.cat([before.right + moved_a, moved_a]))
                for moved_a, moved_b in self._moves(pair)
            ]
            total += gram(changes)
        return total

    def change(self, pair: LoraPair, how: Combination) -> LowRank:
        """``sum_k w_k s dB_k A_k + s B_0 sum_k w_k dA_k``, of rank n r + r.

        Raises:
            AggregationError: for a statistic of coordinates, which would need the dense product.
        """
        if how.weights is None:
            raise AggregationError("a statistic of coordinates would need the dense d x d product: use factor space")
        before = effective(pair)
        common = torch.zeros_like(before.right)
        lefts, rights = [before.left], [common]
        for weight, (moved_a, moved_b) in zip(how.weights.tolist(), self._moves(pair), strict=True):
            common += weight * moved_a
            if weight:
                lefts.append(weight * moved_b)
                rights.append(before.right + moved_a)
        return LowRank(torch.cat(lefts, dim=1), torch.cat(rights))

    def _moves(self, pair: LoraPair) -> Iterator[tuple[Tensor, Tensor]]:
        """``dA_k`` and ``s dB_k`` of every client: small updates lose no digits to a difference of products."""
        for client_id in self.spool.client_ids:
            moved_a = self.spool.get(client_id, f"{pair.module.name}.factor_a").double()
            moved_b = self.spool.get(client_id, f"{pair.module.name}.factor_b").double()
            yield moved_a, moved_b * pair.scaling
