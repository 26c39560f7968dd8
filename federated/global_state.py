"""The server's adapter between rounds: a float32 master copy, an optional frozen residual, and the rule's memory.

`GlobalState.materialise` gives a client what it starts from, at its own rank; `GlobalState.export` gives a device what
it serves. Knows no Flower and no files.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from federated.residual import at_rank, folded, merged
from federated.state import AdapterState, RuleState

__all__ = ["GlobalState"]


@dataclass(frozen=True)
class GlobalState:
    """The server's adapter and what its rule remembers.

    Args:
        adapter: trainable factors and dense tensors, float32 whatever the devices use; no residual of its own.
        residual: a second, frozen adapter on top of the base (FLoRA's and FedEx-LoRA's growth lives there, never in
            the base); None where unused.
        rule_state: the rule's memory.
    """

    adapter: AdapterState
    residual: AdapterState | None = None
    rule_state: RuleState = field(default_factory=RuleState)

    def materialise(self, rank: int | None = None) -> AdapterState:
        """The adapter as a client holds it: cast to the spec's dtype, with the residual beside it.

        Args:
            rank: the client's own rank: the closest adapter of that rank; None means the adapter's.

        Raises:
            AggregationError: if the rank is above the adapter's, or another one for an adapter with a core.
        """
        adapter = self.adapter if rank in (None, self.adapter.spec.rank) else at_rank(self.adapter, rank or 0)
        return replace(adapter.cast(adapter.spec.dtype), residual=self.residual)

    def export(self) -> AdapterState:
        """The adapter that a version publishes: plain LoRA, core and residual merged into its factors."""
        return replace(merged(folded(self.materialise())), extra={}).cast(self.adapter.spec.dtype)
