"""FFA-LoRA: freeze A, which all clients share, and average B.

    A = A_0 for ever,    B = sum_k p_k B_k,    so that    scaling * B A_0 = sum_k p_k (scaling * B_k A_0)    exactly

It holds only because every client has the very same ``A_0``: here it is part of the global adapter and never trained.
Half of FedIT's bytes go up. The price is expressivity: the update stays in the row space of a random ``A_0``.

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, section 3.
"""

from __future__ import annotations

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["FFALoRA"]

_GROUPS = ("factor_b", "dense")


class FFALoRA:
    """Weighted mean of B under a frozen, shared A."""

    name = "ffa"
    properties = RuleProperties(
        exactness="exact",
        space="factor",
        linear=True,
        mean_decides=True,
        asynchronous="any",
        paper="Sun et al. 2024, arXiv:2403.12313",
        gauge="refused",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FFA-LoRA remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train B and the dense tensors."""
        return plan_groups(state, client, phase, _GROUPS)

    def start(self, state: GlobalState, phase: int) -> FactorMean:
        """A fresh mean of B.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FFA-LoRA", phase)
        return FactorMean(state.adapter, _GROUPS)
