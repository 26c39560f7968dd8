"""What rules that work on products share: the clients' factors on disk, and the weighted mean of one layer's products.

    dW = sum_k p_k s_k B_k A_k,    p_k = weight_k / sum_j weight_j,    s_k = alpha / r_k (alpha / sqrt(r_k) for rsLoRA)

of what client k holds after training, at its own rank r_k, as one product of stacked factors: exact, and never d x d.
A frozen residual that all clients share is not in it: it is the same on both sides. Dense tensors are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from federated.aggregation.protocol import Result
from federated.aggregation.spool import Spool
from federated.delta import Update, apply
from federated.errors import AggregationError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.lowrank import LowRank, effective, sum_streaming
from federated.manifest import AdapterSpec
from federated.state import AdapterState, LoraPair, Tensors, group_of
from federated.sums import WeightedSum

__all__ = ["ProductMean"]


class ProductMean:
    """Weighted mean of products: factors wait in a file and are read back in the order of client ids.

    In memory are the sum of one layer, of at most twice its smaller side in columns however many clients there are, and
    the sum of the dense tensors.

    Args:
        state: before the round.
    """

    def __init__(self, state: GlobalState) -> None:
        self._state = state
        self._weights: dict[str, float] = {}
        self._specs: dict[str, AdapterSpec] = {}
        self._spool = Spool()
        self._dense = WeightedSum()

    def add(self, update: Update, weight: float) -> AdapterState:
        """Take in one admitted update that trained all groups; returns what its client holds now.

        Raises:
            AggregationError: if it does not hold exactly the adapter's tensors; nothing is taken in then.
        """
        received = update.received or self._state.materialise()
        after = apply(received, update.delta)
        if not (math.isfinite(weight) and weight > 0):
            raise AggregationError(f"weight {weight} of an update: expected a finite number > 0")
        self._spool.put(update.client_id, {n: t for n, t in after.tensors.items() if group_of(n) != "dense"})
        dense = {name: tensor for name, tensor in update.delta.items() if group_of(name) == "dense"}
        if dense:
            self._dense.add(dense, weight)
        self._specs[update.client_id] = received.spec
        self._weights[update.client_id] = weight  # last: what failed above is in the spool alone, and never read
        return after

    @property
    def weights(self) -> Mapping[str, float]:
        """Client id to weight."""
        return self._weights

    def require_some(self) -> None:
        """Refuse to finish without an update.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        if not self._weights:
            raise NotEnoughUpdates("no update to combine: expected at least one good update")

    def pairs(self, layer: str) -> dict[str, LoraPair]:
        """One layer's factors of every client, float32, in the order of client ids."""
        return dict(self.each_pair(layer))

    def each_pair(self, layer: str) -> Iterator[tuple[str, LoraPair]]:
        """`pairs`, one at a time."""
        for client_id in sorted(self._weights):
            spec = self._specs[client_id]
            module = next(one for one in spec.modules if one.name == layer)
            factor_a = self._spool.get(client_id, f"{layer}.factor_a")
            factor_b = self._spool.get(client_id, f"{layer}.factor_b")
            yield client_id, LoraPair(module, factor_a, factor_b, spec.scaling(module))

    def mean(self, layer: str, weights: Mapping[str, float] | None = None) -> LowRank:
        """``sum_k p_k s_k B_k A_k`` of one layer, float64.

        Args:
            layer: name of an adapted layer.
            weights: client id to weight, in place of those given with the updates; need not add up to 1.
        """
        chosen = self._weights if weights is None else weights
        total = sum(weight for _, weight in sorted(chosen.items()))
        terms = ((chosen[client_id] / total, effective(pair)) for client_id, pair in self.each_pair(layer))
        return sum_streaming(terms).product

    def dense_delta(self) -> dict[str, Tensor]:
        """The weighted mean of the dense tensors' deltas, float64; empty where there are none."""
        return self._dense.mean() if self._dense.count else {}

    def with_dense_mean(self) -> dict[str, Tensor]:
        """The global adapter's tensors with its dense ones moved by the weighted mean of the deltas, float32."""
        before, mean = self._state.adapter, self.dense_delta()
        moved = {name: (before.tensors[name].double() + mean[name]).float() for name in mean}
        return {**before.tensors, **moved}

    def result(
        self,
        state: GlobalState | None = None,
        *,
        metrics: Mapping[str, float],
        mean_delta: Tensors | None = None,
    ) -> Result:
        """The outcome, with this round's participants and their weight."""
        total = sum(self._weights.values())
        count = len(self._weights)
        return Result(mean_delta, state, participants=count, total_weight=total, metrics=metrics)
