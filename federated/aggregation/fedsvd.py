"""FedSVD: FFA-LoRA whose A follows: after each round the product is factorised anew.

    B = sum_k p_k B_k  under a shared A;    U S V^T = B A;    A <- V^T,  B <- U S

Exact: the mean is exact because A is shared (see `federated.aggregation.ffa`), and B A has rank r, so nothing is cut
off. A gets orthonormal rows that span what was learnt, so that the next round's B trains in a useful and well-scaled
basis. Only B goes up; both factors go down. Directions that B A does not use stay in A's row space, with B zero.

Source: Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", 2025, algorithm 1.
Where we differ: the factorisation comes from the factors (`federated.lowrank`), never from the d x d product.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from federated.aggregation.factor_mean import FactorMean, plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.delta import Update
from federated.global_state import GlobalState
from federated.lowrank import decompose, effective
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, LoraPair, RuleState, Tensors

__all__ = ["FedSVD"]

_GROUPS = ("factor_b", "dense")


class FedSVD:
    """Weighted mean of B under a shared A, then the singular value decomposition of the product."""

    name = "fedsvd"
    properties = RuleProperties(
        exactness="exact",
        space="factor",
        linear=True,
        mean_decides=True,
        fixed_space=False,
        asynchronous="same_basis",
        paper="Lee et al. 2025, arXiv:2505.12805",
        gauge="refused",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FedSVD remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train B and the dense tensors."""
        return plan_groups(state, client, phase, _GROUPS)

    def start(self, state: GlobalState, phase: int) -> _Refactored:
        """A fresh mean of B.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FedSVD", phase)
        return _Refactored(state)


class _Refactored:
    """A mean of B, and the next adapter made of it."""

    def __init__(self, state: GlobalState) -> None:
        self._state = state
        self._mean = FactorMean(state.adapter, _GROUPS)

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update."""
        self._mean.add(update, weight)

    def finish(self) -> Result:
        """The next adapter.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        result, before = self._mean.finish(), self._state.adapter
        moves = result.mean_delta or {}
        moved = {name: tensor.double() + moves.get(name, 0.0) for name, tensor in before.tensors.items()}
        for pair in AdapterState(before.spec, moved).pairs():
            moved |= _orthogonal(pair)
        tensors = {name: tensor.float() for name, tensor in moved.items()}
        state = replace(self._state, adapter=AdapterState(before.spec, tensors))
        return replace(result, mean_delta=None, state=state)


def _orthogonal(pair: LoraPair) -> Tensors:
    """The same product from factors ``A = V^T`` and ``B = U S / scaling``, float64.

    Where the rank is larger than a side of the layer, the rows that are left over stay as they are, with B zero.
    """
    found, name = decompose(effective(pair)), pair.module.name
    factor_a, factor_b = pair.factor_a.clone(), torch.zeros_like(pair.factor_b)
    count = len(found.s)
    factor_a[:count] = found.v.T
    factor_b[:, :count] = found.u * found.s / pair.scaling
    return {f"{name}.factor_a": factor_a, f"{name}.factor_b": factor_b}
