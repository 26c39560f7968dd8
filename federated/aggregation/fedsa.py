"""FedSA-LoRA: only A is shared; each client keeps its own B, and its own head.

    A = sum_k p_k A_k;    client k goes on from    scaling * B_k A = sum_j p_j scaling * B_k A_j

A learns what clients have in common and B what sets them apart, so A is averaged and B never leaves the client. Exact:
with its own B fixed, each client's effective update is linear in A. Half of FedIT's bytes go up, and no head.

There is no single global model: the server holds A beside a B and a head that nobody trained, and its versions are not
servable. A client that was not in a cohort yet starts from those; one that was left out goes on from its own.

Source: Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, section 4. Where
we differ: nothing in the rule; the whole adapter goes down each round, so that a client may join at any time.
"""

from __future__ import annotations

from dataclasses import replace

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.delta import Update
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState

__all__ = ["FedSALoRA"]

_GROUPS = ("factor_a", "factor_b", "dense")
_KEPT = ("factor_b", "dense")


class FedSALoRA:
    """Weighted mean of A; B and the dense tensors are the clients' own."""

    name = "fedsa"
    properties = RuleProperties(
        exactness="exact",
        space="factor",
        linear=True,
        mean_decides=True,
        personal=True,
        asynchronous="any",
        paper="Guo et al. 2025, arXiv:2410.01463",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FedSA-LoRA remembers nothing: its clients do."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, send A."""
        plan, payload = plan_groups(state, client, phase, _GROUPS)
        return replace(plan, kept=_KEPT), payload

    def start(self, state: GlobalState, phase: int) -> _SharedA:
        """A fresh mean of A.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FedSA-LoRA", phase)
        return _SharedA(state)


class _SharedA:
    """A mean of A, in an adapter that nobody can serve."""

    def __init__(self, state: GlobalState) -> None:
        self._mean = FactorMean(state.adapter, ("factor_a",))

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update."""
        self._mean.add(update, weight)

    def finish(self) -> Result:
        """The mean delta of A.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        return replace(self._mean.finish(), servable=False)
