"""FedNova: clients that take more steps do not pull harder.

    w <- w + tau_eff sum_k p_k d_k / tau_k,    tau_eff = sum_k p_k tau_k

with ``d_k`` the move of client k in ``tau_k`` optimizer steps. Plain averaging gives a client that trains on more data,
and so in more steps, a larger say than its weight ``p_k``. With equal steps it is FedIT.

``tau_k`` is not what a client says: it follows from the number of examples, which is bounded by ``round.max_examples``
and is a weight already, and from the server's own plan. A claim of very many would still scale up everybody's move, so
an update of more than ``max_steps`` is refused.

Source: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS
2020, equation 6. Where we differ: each step counts as one, which is the paper's ``||a_k||_1`` for plain SGD; under
AdamW or momentum it is an approximation.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.config import STRICT
from federated.delta import Update
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["FedNova"]

_GROUPS = ("factor_a", "factor_b", "dense")


@dataclass(frozen=True, config=STRICT)
class FedNova:
    """Weighted mean of the moves per step, times the mean number of steps.

    Args:
        max_steps: most optimizer steps that one update may stand for.
    """

    name = "fednova"
    properties = RuleProperties(
        exactness="approximate",
        space="factor",
        linear=True,
        needs_lora=False,
        paper="Wang et al. 2020, arXiv:2007.07481",
    )

    max_steps: Annotated[int, Field(ge=1)] = 10_000

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FedNova remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the global adapter."""
        return plan_groups(state, client, phase, _GROUPS)

    def start(self, state: GlobalState, phase: int) -> _Normalised:
        """A fresh mean.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FedNova", phase)
        return _Normalised(state.adapter, self.max_steps)


class _Normalised:
    """Mean of the moves per step, and mean number of steps."""

    def __init__(self, like: AdapterState, max_steps: int) -> None:
        self._mean = FactorMean(like, _GROUPS)
        self._max_steps = max_steps
        self._steps = Fraction(0)

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Raises:
            AggregationError: if it does not fit, or stands for too many steps; the mean is unchanged.
        """
        if not 1 <= update.steps <= self._max_steps:
            found = f"{update.steps} steps behind the update of {update.client_id}"
            raise AggregationError(
                f"{found}, at most {self._max_steps} are accepted: raise strategy.options.max_steps, or set train.steps"
            )
        per_step = {name: tensor.double() / update.steps for name, tensor in update.delta.items()}
        self._mean.add(replace(update, delta=per_step), weight)
        self._steps += Fraction(weight) * update.steps

    def finish(self) -> Result:
        """The mean move; reports ``effective_steps``, tau_eff.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        result = self._mean.finish()
        steps = float(self._steps) / result.total_weight
        moved = {name: steps * tensor for name, tensor in (result.mean_delta or {}).items()}
        return replace(result, mean_delta=moved, metrics={"effective_steps": steps})
