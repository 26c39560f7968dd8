"""FedProx: FedIT whose clients are held near what they received.

    min_w  f_k(w) + mu / 2 ||w - w_received||^2,    A = sum_k p_k A_k,    B = sum_k p_k B_k

A larger ``mu`` means less drift between clients with different data, and smaller steps; 0 is FedIT. It adds a gradient
on the client and changes nothing on the server: other rules take the same from ``train.proximal_mu``.

Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, algorithm 2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.config import STRICT
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["FedProx"]

_GROUPS = ("factor_a", "factor_b", "dense")


@dataclass(frozen=True, config=STRICT)
class FedProx:
    """Weighted mean of all tensors, trained with a proximal term.

    Args:
        mu: of the proximal term; 0 leaves it to ``train.proximal_mu``.
    """

    name = "fedprox"
    properties = RuleProperties(
        exactness="approximate",
        space="factor",
        linear=True,
        mean_decides=True,
        needs_lora=False,
        asynchronous="any",
        paper="Li et al. 2020, arXiv:1812.06127",
    )

    mu: Annotated[float, Field(ge=0)] = 0.01

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FedProx remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, near the global adapter."""
        plan, payload = plan_groups(state, client, phase, _GROUPS)
        return replace(plan, proximal_mu=self.mu), payload

    def start(self, state: GlobalState, phase: int) -> FactorMean:
        """A fresh mean.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FedProx", phase)
        return FactorMean(state.adapter, _GROUPS)
