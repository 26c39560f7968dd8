"""FedIT: average each factor on its own.

    A = sum_k p_k A_k,    B = sum_k p_k B_k,    p_k = weight_k / sum_j weight_j

Approximate by design: ``B A`` differs from ``sum_k p_k B_k A_k`` by the cross terms ``B_i A_j``. Of adapters without
factors (IA3, norms, a head, a prompt, a whole small model) it is the plain mean of the weights: federated averaging.

Source: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", 2023, section 3.
"""

from __future__ import annotations

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["FedIT"]

_GROUPS = ("factor_a", "factor_b", "dense")


class FedIT:
    """Weighted mean of LoRA factors and dense tensors alike."""

    name = "fedit"
    properties = RuleProperties(
        exactness="approximate",
        space="factor",
        linear=True,
        mean_decides=True,
        needs_lora=False,
        asynchronous="any",
        paper="Zhang et al. 2023, arXiv:2305.05644",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FedIT remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the global adapter, at its rank."""
        return plan_groups(state, client, phase, _GROUPS)

    def start(self, state: GlobalState, phase: int) -> FactorMean:
        """A fresh mean.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FedIT", phase)
        return FactorMean(state.adapter, _GROUPS)
