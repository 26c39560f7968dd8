"""FlexLoRA: average the effective updates themselves, and give back their best approximation of the adapter's rank.

    dW = sum_k p_k scaling * B_k A_k,    U S V^T = dW,    B = U_r (S_r / scaling)^1/2,    A = (S_r / scaling)^1/2 V_r^T

Optimal truncation: no adapter of rank r is closer to dW (Eckart and Young). The d x d product is never formed:
`federated.lowrank` works on the stacked factors. The share of dW's energy that rank r keeps is reported each round.

Where we differ: the paper's code puts the singular values on one side and runs a dense SVD; here both factors get
their root, so that both train at like pace, and directions that dW does not use keep the rows of A that they had (B
is zero there): with both zero they could never be trained again. Dense tensors are averaged.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024, section 3.
"""

from __future__ import annotations

import math

from federated.aggregation.factor_mean import plan_groups, require_first_phase
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.aggregation.spool import Spool
from federated.aggregation.sums import WeightedSum
from federated.delta import Update, apply
from federated.errors import AggregationError, NotEnoughUpdates
from federated.lowrank import LowRank, Spectrum, balanced_factors, decompose, effective, sum_of
from federated.manifest import AdapterSpec, ModuleSpec, TrainPlan
from federated.state import AdapterState, GlobalState, LoraPair, RuleState, Tensors, group_of

__all__ = ["FlexLoRA"]

_GROUPS = ("factor_a", "factor_b", "dense")
_IDLE = 1e-10
"""A singular value below this share of the largest is no direction of dW, but what rounding left."""


class FlexLoRA:
    """Weighted mean of the products, truncated to the adapter's rank."""

    name = "flexlora"
    properties = RuleProperties(
        exactness="truncation",
        space="product",
        linear=False,
        fixed_space=False,
        paper="Bai et al. 2024, arXiv:2402.11505",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FlexLoRA remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the global adapter."""
        return plan_groups(state, client, phase, _GROUPS)

    def start(self, state: GlobalState, phase: int) -> _Products:
        """A fresh collection.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FlexLoRA", phase)
        return _Products(state)


class _Products:
    """Collects factors on disk, and sums the products of one layer at a time."""

    def __init__(self, state: GlobalState) -> None:
        self._state = state
        self._received = state.materialise()
        self._weights: dict[str, float] = {}
        self._spool = Spool()
        self._dense = WeightedSum()

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Raises:
            AggregationError: if it does not hold exactly the adapter's tensors; nothing is taken in then.
        """
        after = apply(self._received, update.delta)
        if not (math.isfinite(weight) and weight > 0):
            raise AggregationError(f"weight {weight} of an update: expected a finite number > 0")
        self._spool.put(update.client_id, {n: t for n, t in after.tensors.items() if group_of(n) != "dense"})
        dense = {name: tensor for name, tensor in update.delta.items() if group_of(name) == "dense"}
        if dense:
            self._dense.add(dense, weight)
        self._weights[update.client_id] = weight  # last: what failed above is in the spool alone, and never read

    def finish(self) -> Result:
        """The truncated mean as the next adapter; reports ``energy_kept``, the share of dW's energy in it.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        if not self._weights:
            raise NotEnoughUpdates("no update to combine: expected at least one good update")
        before = self._state.adapter
        tensors, kept, energy = dict(before.tensors), 0.0, 0.0
        for pair in before.pairs():
            found = decompose(self._mean_product(pair.module))
            tensors |= _factors(found, pair)
            kept, energy = kept + found.kept(pair.module.rank) * found.energy, energy + found.energy
        if before.dense():
            mean = self._dense.mean()
            tensors |= {name: (before.tensors[name].double() + mean[name]).float() for name in mean}
        return Result(
            state=GlobalState(AdapterState(before.spec, tensors), self._state.residual, self._state.rule_state),
            participants=len(self._weights),
            total_weight=sum(self._weights.values()),
            metrics={"energy_kept": kept / energy if energy else 1.0},
        )

    def _mean_product(self, module: ModuleSpec) -> LowRank:
        """``sum_k p_k scaling B_k A_k`` of one layer, in the order of client ids."""
        weights = sorted(self._weights.items())
        total, terms = sum(weight for _, weight in weights), []
        for client_id, weight in weights:
            factor_a = self._spool.get(client_id, f"{module.name}.factor_a")
            factor_b = self._spool.get(client_id, f"{module.name}.factor_b")
            pair = LoraPair(module, factor_a, factor_b, self._received.spec.scaling(module))
            terms.append((weight / total, effective(pair)))
        return sum_of(terms)


def _factors(found: Spectrum, before: LoraPair) -> Tensors:
    """The layer's next factors, float32; idle directions keep their rows of A."""
    name, rank = before.module.name, before.module.rank
    factor_a, factor_b = balanced_factors(found, rank=rank, scaling=before.scaling)
    used = int((found.s[:rank] > _IDLE * found.s[:1]).sum())
    factor_a[used:], factor_b[:, used:] = before.factor_a[used:].double(), 0.0
    return {f"{name}.factor_a": factor_a.float(), f"{name}.factor_b": factor_b.float()}
