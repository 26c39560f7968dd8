"""FLASC: sparse messages, dense training: a client is sent the largest entries, and sends back those that moved most.

    received_k = top(w, density_down)          the entries of largest |w|, the others zero
    d_k        = train(received_k) - received_k                                     all entries are trained
    w          <- w + step(sum_k p_k top(d_k, density_up))                          step: the server optimizer, Adam

``top(x, q)`` keeps the ``ceil(q n)`` entries of largest magnitude of all factors together. Both messages really are
smaller: values and positions travel, not zeros (`federated.sparse`). Approximate by design, as FedIT is, and by what is
left out on either way.

What is measured before a round's training is the sparse adapter that the clients were sent; versions hold, and the
run's last evaluation measures, the whole one. Dense tensors (heads, norms, biases) travel whole: here the sparsity is
LoRA's.

Source: Kuo et al., "Federated LoRA with Sparse Communication", 2024, algorithm 1.
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
from federated.sparse import masked, split
from federated.state import AdapterState, RuleState

__all__ = ["FLASC"]

_GROUPS = ("factor_a", "factor_b", "dense")


@dataclass(frozen=True, config=STRICT)
class FLASC:
    """Weighted mean of sparse deltas.

    Args:
        density_down: share of the factors' entries that a client receives; 1 sends all.
        density_up: share of the factors' entries that it sends; 1 sends all.
    """

    name = "flasc"
    properties = RuleProperties(
        exactness="approximate",
        space="factor",
        linear=False,  # each message has entries of its own: they cannot be added up as they travel
        paper="Kuo et al. 2024, arXiv:2406.05233",
    )

    density_down: Annotated[float, Field(gt=0, le=1)] = 0.25
    density_up: Annotated[float, Field(gt=0, le=1)] = 0.25

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FLASC remembers nothing; Adam's moments are the server optimizer's."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the largest entries of the global adapter."""
        plan, payload = plan_groups(state, client, phase, _GROUPS)
        plan = replace(plan, density_down=self.density_down, density_up=self.density_up)
        if self.density_down == 1:
            return plan, payload
        factors, dense = split(payload.tensors)
        return plan, replace(payload, tensors={**dense, **masked(factors, self.density_down)})

    def start(self, state: GlobalState, phase: int) -> FactorMean:
        """A fresh mean.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FLASC", phase)
        return FactorMean(state.adapter, _GROUPS)
