"""SCAFFOLD: each client's gradients are corrected by how they differ from everybody's.

    client      w <- w - eta (grad + c - c_k)   for K_k steps;     c_k <- c_k - c + (w_received - w) / (K_k eta)
    server      w <- w + sum_k p_k d_k;         c  <- c + sum_k weight_k dc_k / W

with ``dc_k`` the change of ``c_k`` and ``W`` the weights of all clients that have taken part so far: c is the weighted
mean of all c_k. The server sends c with the adapter, twice the bytes down. Nothing more goes up: by the client's own
equation ``dc_k = -c - d_k / (K_k eta)``, and the server knows c, ``d_k`` and ``K_k``. Variates are kept as mean moves
per step, ``v = -eta c``, so that it needs no step size either (`federated.corrections`):

    v <- v + sum_k weight_k (d_k / K_k - v) / W

Clients train by SGD without momentum and with a constant step size, or the difference of two points says nothing about
the gradients between them: ``strategy=scaffold`` chooses ``train=plain_sgd``, and all else is refused before it runs.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, algorithm 1
with option II. Where we differ: the mean is over clients that took part, weighted as the updates are, in place of all N
counted alike; a client that comes later takes c for its own c_k, so its first training is plain. The server's step size
is the server optimizer's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.aggregation.taken_part import TakenPart
from federated.corrections import VARIATE
from federated.delta import Update
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState
from federated.sums import WeightedSum

__all__ = ["Scaffold"]

_GROUPS = ("factor_a", "factor_b", "dense")


class Scaffold:
    """Weighted mean of all tensors, trained with control variates."""

    name = "scaffold"
    properties = RuleProperties(
        exactness="approximate",
        space="factor",
        linear=False,
        needs_lora=False,
        own_payloads=True,
        plain_sgd=True,
        paper="Karimireddy et al. 2020, arXiv:1910.06378",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """Nobody has taken part: the variate is zero."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the global adapter, with the server's variate beside it."""
        plan, payload = plan_groups(state, client, phase, _GROUPS)
        taken = TakenPart(state.rule_state).last_round(client.client_id)
        extra = {VARIATE + name: tensor.float() for name, tensor in _variate(state).items()}
        return replace(plan, correction="scaffold", memory_round=taken), replace(payload, extra=extra)

    def start(self, state: GlobalState, phase: int) -> _Steered:
        """A fresh mean.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("SCAFFOLD", phase)
        return _Steered(state)


def _variate(state: GlobalState) -> dict[str, Tensor]:
    """The mean move per step, float64, zero in the first round."""
    kept = state.rule_state.tensors
    zero = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in state.adapter.tensors.items()}
    return {**zero, **kept}


class _Steered:
    """The mean of the moves, and of the moves per step."""

    def __init__(self, state: GlobalState) -> None:
        self._mean = FactorMean(state.adapter, _GROUPS)
        self._per_step = WeightedSum()
        self._variate = _variate(state)
        self._taken = TakenPart(state.rule_state)

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Raises:
            AggregationError: if it does not hold exactly the adapter's tensors; nothing is taken in then.
        """
        if update.steps < 1:
            raise AggregationError(f"update of {update.client_id} stands for {update.steps} steps; expected some")
        self._mean.add(update, weight)
        self._per_step.add({name: tensor.double() / update.steps for name, tensor in update.delta.items()}, weight)
        self._taken.note(update, weight)

    def finish(self) -> Result:
        """The mean move, and the next variate.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        result, per_step = self._mean.finish(), self._per_step.mean()
        share = result.total_weight / self._taken.total_weight()
        # clients corrected with the variate as it travelled, in float32
        moved = {
            name: variate + share * (per_step[name] - variate.float().double())
            for name, variate in self._variate.items()
        }
        return replace(result, rule_state=RuleState(self._taken.scalars(), moved))
