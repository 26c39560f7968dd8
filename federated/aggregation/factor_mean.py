"""What rules that average tensors share: a streaming weighted mean of some groups, and the plan to train them.

Because the mean is linear, averaging deltas and adding the mean delta to what all clients received is the same as
averaging weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from federated.aggregation.protocol import ClientView, Result
from federated.delta import Update
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import TrainPlan
from federated.state import AdapterState, RuleState, group_of
from federated.sums import WeightedSum

__all__ = ["FactorMean", "plan_groups", "require_first_phase"]


def require_first_phase(rule: str, phase: int) -> None:
    """Refuse a phase that a one-phase rule does not have.

    Raises:
        AggregationError: for a phase other than 1.
    """
    if phase != 1:
        raise AggregationError(f"{rule} has one phase, found phase {phase}")


def plan_groups(
    state: GlobalState, client: ClientView, phase: int, groups: tuple[str, ...], *, mixed_ranks: bool = False
) -> tuple[TrainPlan, AdapterState]:
    """Train these groups from the global adapter: what most rules ask of everybody.

    Raises:
        AggregationError: for a client of another rank than the adapter's, unless the rule takes mixed ranks.
    """
    rank = state.adapter.spec.rank
    if not mixed_ranks and client.rank not in (None, rank):
        raise AggregationError(f"client {client.client_id} trains at rank {client.rank}: this rule needs rank {rank}")
    payload = state.materialise(client.rank)
    return TrainPlan(phase=phase, rank=payload.spec.rank, trainable=groups), payload


class FactorMean:
    """Weighted mean of the tensors of some groups, exact whatever the order of arrival.

    Args:
        like: the global adapter; fixes names and shapes.
        groups: the groups that this round's updates hold.
        remember: makes the rule's memory once the mean is known; default: it stays as it is.
    """

    def __init__(
        self, like: AdapterState, groups: Sequence[str], *, remember: Callable[[], RuleState] | None = None
    ) -> None:
        self._like = {name: tensor.shape for name, tensor in like.tensors.items() if group_of(name) in groups}
        self._remember = remember
        self._sum = WeightedSum()

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Raises:
            AggregationError: if it does not hold exactly these tensors; the mean is unchanged.
        """
        found = {name: tensor.shape for name, tensor in update.delta.items()}
        if found != self._like:
            odd = sorted(dict(found.items() ^ self._like.items()))
            raise AggregationError(f"update of {update.client_id} does not fit the global adapter: {odd[:3]}")
        self._sum.add(update.delta, weight)

    def finish(self) -> Result:
        """The mean delta.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        mean = self._sum.mean()
        memory = self._remember() if self._remember else None
        return Result(
            mean_delta=mean, rule_state=memory, participants=self._sum.count, total_weight=self._sum.total_weight
        )
