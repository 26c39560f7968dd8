"""RoLoRA: train B and A in turns; the factor that rests is the same everywhere, so each round's mean is exact.

    odd turns    A fixed,  B = sum_k p_k B_k:    B A = sum_k p_k B_k A
    even turns   B fixed,  A = sum_k p_k A_k:    B A = sum_k p_k B A_k

B comes first: it starts at zero, and A has no gradient before it moved. The turn is part of the rule's memory, not
of the round's number: a round that missed its quorum does not use up a turn.

Source: Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", 2025, algorithm 1.
"""

from __future__ import annotations

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["RoLoRA"]

_NEXT = {"factor_b": "factor_a", "factor_a": "factor_b"}


def _turn(state: GlobalState) -> str:
    turn = str(state.rule_state.scalars.get("turn"))
    if turn not in _NEXT:
        raise AggregationError(f"the state was not made by RoLoRA: its turn is {turn}, expected factor_a or factor_b")
    return turn


class RoLoRA:
    """Weighted mean of the factor whose turn it is."""

    name = "rolora"
    properties = RuleProperties(
        exactness="exact",
        space="factor",
        linear=True,
        mean_decides=True,
        alternates=True,
        asynchronous="same_basis",
        paper="Chen et al. 2025, arXiv:2502.01755",
        gauge="refused",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """B's turn."""
        return RuleState({"turn": "factor_b"})

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train the factor whose turn it is, and the dense tensors."""
        return plan_groups(state, client, phase, (_turn(state), "dense"))

    def start(self, state: GlobalState, phase: int) -> FactorMean:
        """A fresh mean of that factor.

        Raises:
            AggregationError: for a phase other than 1, or another rule's state.
        """
        require_first_phase("RoLoRA", phase)
        turn = _turn(state)
        return FactorMean(state.adapter, (turn, "dense"), remember=lambda: RuleState({"turn": _NEXT[turn]}))
