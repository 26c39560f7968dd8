"""LoRA-A2: B and A in turns, and of the one that is trained only the ranks that matter most to the client go up.

    odd turns   A fixed,  B <- B + sum_k p_k dB_k M_k
    even turns  B fixed,  A <- A + sum_k p_k M_k dA_k
    score_i   = ||dB_k[:, i] A[i, :]||_F   (||B[:, i] dA_k[i, :]||_F)

``M_k`` keeps the ``rank * N`` ranks of highest score over all N layers together (`federated.rank_selection`).

Alternating freeze is RoLoRA's, and exact; choosing ranks leaves out what a client thinks least important, so the whole
is approximate by design. With ``rank`` no smaller than the adapter's it is RoLoRA.

Where we differ: the paper scores in a first epoch and then trains the chosen ranks alone; here a client trains once,
all ranks of the turn's factor, and scores what it would send: as large a message, without the extra epoch. One
learning rate serves both factors. What goes up has a fixed size, room for ``rank`` ranks in every layer, also where
layers differ in width.

Source: Koo et al., "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients", ACL 2025,
algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from federated.aggregation.factor_mean import FactorMean, require_first_phase
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.aggregation.rolora import RoLoRA
from federated.config import STRICT
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["LoRAA2"]


@dataclass(frozen=True, config=STRICT)
class LoRAA2:
    """Weighted mean of the chosen ranks of the factor whose turn it is.

    Args:
        rank: ranks per layer, on average, that a client sends.
    """

    name = "lora_a2"
    properties = RuleProperties(
        exactness="approximate",
        space="factor",
        linear=False,  # each message has ranks of its own: they cannot be added up as they travel
        alternates=True,
        gauge="refused",
        paper="Koo et al. 2025, arXiv:2410.22815",
    )

    rank: Annotated[int, Field(ge=1)] = 2

    def init(self, spec: AdapterSpec) -> RuleState:
        """B's turn."""
        return RoLoRA().init(spec)

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train the factor whose turn it is, and the dense tensors; send the best ranks."""
        plan, payload = RoLoRA().plan(state, client, phase)
        every = self.rank >= payload.spec.rank
        return replace(plan, rank_budget=0 if every else self.rank), payload

    def start(self, state: GlobalState, phase: int) -> FactorMean:
        """A fresh mean of that factor.

        Raises:
            AggregationError: for a phase other than 1, or another rule's state.
        """
        require_first_phase("LoRA-A2", phase)
        return RoLoRA().start(state, phase)
