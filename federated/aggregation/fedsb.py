"""Fed-SB: a small core between frozen factors that all share is trained and averaged.

    dW_k = scaling * B R_k A,    R = sum_k p_k R_k:    scaling * B R A = sum_k p_k scaling * B R_k A    exactly

B and A never move and are the same everywhere, so the effective update is linear in R (rank x rank). Only R and the
dense tensors go up: bytes do not depend on the layer's size. The space does not move, so server optimizers compose.

The price is expressivity: all that can be learnt lies between the columns of B and the rows of A, so where these come
from decides. The paper takes them, and R's first value, from the singular value decomposition of a first full gradient
over some of the data, which a server without data cannot compute. Here they come from the frozen layer itself, or at
random, R starts at zero, and nothing about anybody's data is spent on it: see `federated.adapters.core`.

Source: Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning", 2025. Where we differ: the start, as above; LoRA's scaling stays part of the product; A and
B go down in each round, so that a client may join at any time.
"""

from __future__ import annotations

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["FedSB"]

_GROUPS = ("core", "dense")


class FedSB:
    """Weighted mean of cores between frozen, shared factors."""

    name = "fedsb"
    properties = RuleProperties(
        exactness="exact",
        space="factor",
        linear=True,
        mean_decides=True,
        adapter="lora_xs",
        gauge="refused",
        paper="Singhal et al. 2025, arXiv:2502.15436",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """Fed-SB remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train the cores and the dense tensors.

        Raises:
            AggregationError: for an adapter without cores.
        """
        spec = state.adapter.spec
        if not spec.has_core:
            raise AggregationError(f"Fed-SB averages cores, and a {spec.peft_type} adapter has none: use lora_xs")
        return plan_groups(state, client, phase, _GROUPS)

    def start(self, state: GlobalState, phase: int) -> FactorMean:
        """A fresh mean of the cores.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("Fed-SB", phase)
        return FactorMean(state.adapter, _GROUPS)
