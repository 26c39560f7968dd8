"""FedIT: average each factor on its own.

    A = sum_k p_k A_k,    B = sum_k p_k B_k,    p_k = weight_k / sum_j weight_j

Approximate by design: ``B A`` differs from ``sum_k p_k B_k A_k`` by the cross terms ``B_i A_j``. Because the mean
is linear, averaging deltas and adding the mean delta to what all clients received is the same as averaging weights.

Source: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", 2023, section 3.
"""

from __future__ import annotations

from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.aggregation.sums import WeightedSum
from federated.delta import Update
from federated.errors import AggregationError
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, GlobalState, RuleState, Tensors

__all__ = ["FedIT"]


class _Mean:
    """Streaming weighted mean over the names and shapes of the global adapter."""

    def __init__(self, like: Tensors) -> None:
        self._like = {name: tensor.shape for name, tensor in like.items()}
        self._sum = WeightedSum()

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update."""
        found = {name: tensor.shape for name, tensor in update.delta.items()}
        if found != self._like:
            odd = sorted(dict(found.items() ^ self._like.items()))
            raise AggregationError(f"update of {update.client_id} does not fit the global adapter: {odd[:3]}")
        self._sum.add(update.delta, weight)

    def finish(self) -> Result:
        """The mean delta."""
        mean = self._sum.mean()
        return Result(mean_delta=mean, participants=self._sum.count, total_weight=self._sum.total_weight)


class FedIT:
    """Weighted mean of LoRA factors and dense tensors alike."""

    name = "fedit"
    properties = RuleProperties(
        exactness="approximate",
        space="factor",
        linear=True,
        paper="Zhang et al. 2023, arXiv:2305.05644",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FedIT remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the global adapter, at its rank."""
        payload = state.materialise(client.rank)
        return TrainPlan(phase=phase, rank=payload.spec.rank), payload

    def start(self, state: GlobalState, phase: int) -> _Mean:
        """A fresh mean.

        Raises:
            AggregationError: for a phase other than 1.
        """
        if phase != 1:
            raise AggregationError(f"FedIT has one phase, found phase {phase}")
        return _Mean(state.adapter.tensors)
