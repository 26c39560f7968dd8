"""FedRot-LoRA: each client turns its factors towards the received ones before they are averaged.

    R_k = rotation that brings R^T A_k nearest to A_ref (odd turns), or B_k R nearest to B_ref (even turns)
    A = sum_k p_k R_k^T A_k,    B = sum_k p_k B_k R_k

``(B_k R_k)(R_k^T A_k) = B_k A_k``: nothing of what a client learnt changes, but clients that hold like updates in
different bases no longer cancel each other out. The reference is what all of them received. The mean itself is FedIT's,
and as approximate; clients that are equal up to a rotation are averaged exactly. ``strength`` below 1 turns less far:
the rotation nearest to ``(1 - strength) I + strength R_k``; 0 is FedIT.

The turn is part of the rule's memory, not of the round's number: a round that missed its quorum does not use one up. A
comes first: B starts at zero, and says nothing.

Source: Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", ICML 2026; turns, rotations
without reflection and the softer variant as in its code. Where we differ: a direction that the reference does not
decide stays as it is (`federated.alignment`), and the code's rotation would be arbitrary; dense tensors are averaged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.config import STRICT
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["FedRotLoRA"]

_GROUPS = ("factor_a", "factor_b", "dense")
_NEXT = {"factor_a": "factor_b", "factor_b": "factor_a"}


def _reference(state: GlobalState) -> str:
    found = str(state.rule_state.scalars.get("reference"))
    if found not in _NEXT:
        raise AggregationError(
            f"the state was not made by FedRot-LoRA: its reference is {found}, expected factor_a or factor_b"
        )
    return found


@dataclass(frozen=True, config=STRICT)
class FedRotLoRA:
    """Weighted mean of factors that the clients have aligned.

    Args:
        strength: how far clients turn their factors, from 0 (FedIT) to 1 (all the way).
    """

    strength: Annotated[float, Field(ge=0, le=1)] = 1.0

    name = "fedrot"
    properties = RuleProperties(
        exactness="approximate",
        space="factor",
        linear=True,
        mean_decides=True,
        asynchronous="same_basis",
        paper="Zhang et al. 2026, arXiv:2602.23638",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """A's turn to be the reference."""
        return RuleState({"reference": "factor_a"})

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, and send the factors aligned."""
        plan, payload = plan_groups(state, client, phase, _GROUPS)
        return replace(plan, align=_reference(state), align_strength=self.strength), payload

    def start(self, state: GlobalState, phase: int) -> FactorMean:
        """A fresh mean.

        Raises:
            AggregationError: for a phase other than 1, or another rule's state.
        """
        require_first_phase("FedRot-LoRA", phase)
        following = RuleState({"reference": _NEXT[_reference(state)]})
        return FactorMean(state.adapter, _GROUPS, remember=lambda: following)
