"""FedDyn: clients add a linear term to their loss, so that where they stop is where all would stop together.

    client      min_w  f_k(w) - <g_k, w> + alpha / 2 ||w - w_received||^2;     g_k <- g_k - alpha d_k
    server      h <- h - alpha sum_k weight_k d_k / W;     w <- w + sum_k p_k d_k - h / alpha

with ``d_k`` the move of client k and ``W`` the weights of all clients: h is the weighted mean of all g_k. Both are kept
as sums of moves, ``g_k = -alpha m_k`` (`federated.corrections`), so that alpha cancels on the server:

    m <- (sum of weight_k d_k over all rounds) / W;        w <- w + sum_k p_k d_k + m

It goes beyond the mean on purpose: in the first round, with all clients, twice as far. Nothing more travels than under
FedIT, and a server optimizer on top is refused: the step is the rule's own.

Source: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, algorithm 1. Where we differ: sums
are weighted as the updates are, and W counts those that have taken part so far unless ``num_clients`` says how many
there are; clients take the configured local steps, and do not solve their problem to the end. With few steps the sum of
moves grows before the linear term can hold it: take a larger alpha (the paper's are 0.001 to 0.1) or more steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.aggregation.taken_part import TakenPart
from federated.config import STRICT
from federated.delta import Update
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["FedDyn"]

_GROUPS = ("factor_a", "factor_b", "dense")


@dataclass(frozen=True, config=STRICT)
class FedDyn:
    """Weighted mean of all tensors, and a step along what all rounds together moved.

    Args:
        alpha: strength of the regularisation on the client; larger holds clients nearer to what they received.
        num_clients: clients of the federation; 0 counts those that have taken part so far.
    """

    name = "feddyn"
    properties = RuleProperties(
        exactness="approximate",
        space="factor",
        linear=True,
        needs_lora=False,
        own_payloads=True,
        fixed_space=False,
        averages=False,
        paper="Acar et al. 2021, arXiv:2111.04263",
    )

    alpha: Annotated[float, Field(gt=0)] = 1.0
    num_clients: Annotated[int, Field(ge=0)] = 0

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """Nobody has moved."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the global adapter, with the client's own linear term."""
        plan, payload = plan_groups(state, client, phase, _GROUPS)
        taken = TakenPart(state.rule_state).last_round(client.client_id)
        return replace(plan, correction="feddyn", proximal_mu=self.alpha, memory_round=taken), payload

    def start(self, state: GlobalState, phase: int) -> _Dynamic:
        """A fresh mean.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FedDyn", phase)
        return _Dynamic(state, self.num_clients)


class _Dynamic:
    """The mean of the moves, and the sum of all rounds'."""

    def __init__(self, state: GlobalState, num_clients: int) -> None:
        self._mean = FactorMean(state.adapter, _GROUPS)
        self._sum = state.rule_state.tensors
        self._taken = TakenPart(state.rule_state)
        self._num_clients = num_clients

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Raises:
            AggregationError: if it does not hold exactly the adapter's tensors; nothing is taken in then.
        """
        self._mean.add(update, weight)
        self._taken.note(update, weight)

    def finish(self) -> Result:
        """The step, and the next sum.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        result = self._mean.finish()
        mean, total = result.mean_delta or {}, self._taken.total_weight(self._num_clients)
        moved = {name: self._sum.get(name, 0.0) + result.total_weight * one for name, one in mean.items()}
        step = {name: one + moved[name] / total for name, one in mean.items()}
        return replace(result, mean_delta=step, rule_state=RuleState(self._taken.scalars(), moved))
