"""What rules with a frozen residual share: all clients start from the same weights, and nothing is lost.

The residual R is the same for every client, so a round's truth is ``R + dW*``. A rule says which factors the next
adapter has (`Division.factors`) and what adapter and residual together are to hold of dW* (`Division.whole`). The
residual takes the difference, compacted by `federated.residual.grow`:

    R  <-  R + whole - scaling * B A        with A and B rounded as devices hold them

so that what a bfloat16 adapter rounds off is in the float32 residual, too.

A client of a smaller rank trains the closest adapter of its rank, and what that lacks stands in *its* residual: it
starts from the same weights as all others, and its part of the sum is what it trained plus what it was lent. The bound
of the residual's rank is the server's; such a client's may be larger by what its adapter is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from federated.aggregation.factor_mean import plan_groups
from federated.aggregation.products import ProductMean
from federated.aggregation.protocol import ClientView, Result
from federated.delta import Update
from federated.global_state import GlobalState
from federated.lowrank import LowRank, effective, stack
from federated.manifest import AdapterSpec, TrainPlan
from federated.residual import Growth, grow
from federated.state import AdapterState, LoraPair, RuleState, Tensors

__all__ = ["Bound", "Division", "Growing", "MaxRank", "Overflow", "difference", "energy_kept", "held", "plan_whole"]

_GROUPS = ("factor_a", "factor_b", "dense")

MaxRank = Annotated[int, Field(ge=0)]
"""Largest rank of the residual in any layer; 0 means no bound but the layer's smaller side."""

Overflow = Literal["refuse", "truncate"]
"""Above the bound: the round is refused and the adapter stays, or the residual's smallest directions are lost."""


@dataclass(frozen=True)
class Bound:
    """How far the residual may grow: `MaxRank` and `Overflow`."""

    max_rank: int = 0
    overflow: Overflow = "refuse"

    @property
    def lossless(self) -> bool:
        """Whether nothing is ever cut off: a round is refused instead."""
        return not self.max_rank or self.overflow == "refuse"


@dataclass(frozen=True)
class Division:
    """What a rule makes of one layer.

    Args:
        factors: the next adapter's, by canonical name.
        whole: what adapter and residual together are to hold of the round's update.
        kept: energy that a rule's own threshold or rank let pass.
        energy: energy of all that stood before it.
        rank: directions that it let pass.
    """

    factors: Tensors
    whole: LowRank
    kept: float = 0.0
    energy: float = 0.0
    rank: int = 0


def energy_kept(divisions: Sequence[Division]) -> float:
    """Share of the energy, over all layers, that a rule's threshold or rank let pass; 1 where there was none."""
    energy = sum(one.energy for one in divisions)
    return sum(one.kept for one in divisions) / energy if energy else 1.0


def held(factors: Tensors, spec: AdapterSpec) -> Tensors:
    """Factors as a device holds them, float32: rounded to the spec's dtype."""
    return AdapterState(spec, factors).cast(spec.dtype).cast("F32").tensors


def difference(whole: LowRank, pair: LoraPair, factors: Tensors) -> LowRank:
    """``whole - scaling * B A`` for a layer's new factors."""
    name = pair.module.name
    new = pair._replace(factor_a=factors[f"{name}.factor_a"], factor_b=factors[f"{name}.factor_b"])
    return stack([whole, effective(new).scaled(-1.0)])


def plan_whole(state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
    """Train every group, at the client's rank, from the very weights that all others start from."""
    plan, payload = plan_groups(state, client, phase, _GROUPS, mixed_ranks=True)
    lent = _lent(state.materialise(), payload)
    if not lent:
        return plan, payload
    return plan, replace(payload, residual=grow(state.residual, lent, payload, max_rank=0, truncate=False).residual)


def _lent(full: AdapterState, payload: AdapterState) -> dict[str, LowRank]:
    """What an adapter of a smaller rank lacks, layer by layer; none where it lacks nothing."""
    lacking = {}
    for pair, smaller in zip(full.pairs(), payload.pairs(), strict=True):
        if smaller.module.rank < pair.module.rank and pair.factor_b.any():
            lacking[pair.module.name] = stack([effective(pair), effective(smaller).scaled(-1.0)])
    return lacking


class Growing:
    """Takes in updates of any rank; makes the next adapter and a residual that holds what it does not.

    Args:
        state: before the round.
        divide: what becomes of one layer, from the clients' products and the layer as it was.
        bound: of the residual's rank.
        report: what the rule says of the divisions, as metrics.
        remember: the rule's memory for the next round; None keeps it.
    """

    def __init__(
        self,
        state: GlobalState,
        divide: Callable[[Growing, LoraPair], Division],
        *,
        bound: Bound,
        report: Callable[[Sequence[Division]], Mapping[str, float]] = lambda _: {},
        remember: RuleState | None = None,
    ) -> None:
        self._state = state
        self._divide = divide
        self._bound = bound
        self._report = report
        self._remember = remember
        self._products = ProductMean(state)
        self._lent: dict[int, dict[str, LowRank]] = {}
        self._lent_weights: dict[int, list[float]] = {}

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Raises:
            AggregationError: if it does not hold exactly the tensors that its client was sent; nothing is taken in.
        """
        self._products.add(update, weight)
        received = update.received
        if received is not None and received.spec.rank < self._state.adapter.spec.rank:
            rank = received.spec.rank
            if rank not in self._lent:
                self._lent[rank] = _lent(self._state.materialise(), received)
            self._lent_weights.setdefault(rank, []).append(weight)

    @property
    def spec(self) -> AdapterSpec:
        """Of the global adapter."""
        return self._state.adapter.spec

    def mean(self, layer: str) -> LowRank:
        """The round's mean update of one layer, what clients of smaller ranks were lent included, float64."""
        parts = [self._products.mean(layer)]
        for rank, lent in sorted(self._lent.items()):
            if layer in lent:
                parts.append(lent[layer].scaled(sum(sorted(self._lent_weights[rank])) / self._total()))
        return stack(parts)

    def _total(self) -> float:
        return sum(weight for _, weight in sorted(self._products.weights.items()))

    def factors_of(self, layer: str) -> list[tuple[float, LoraPair]]:
        """Each client's share and factors of one layer, in the order of client ids."""
        weights, pairs = self._products.weights, self._products.pairs(layer)
        return [(weights[client_id] / self._total(), pair) for client_id, pair in pairs.items()]

    def finish(self) -> Result:
        """The next adapter and residual.

        Reports ``residual_rank``, ``residual_bytes`` (that each client is sent from now on) and ``residual_kept``
        (share of the residual's energy that its bound let pass), beside what the rule reports.

        Raises:
            NotEnoughUpdates: if nothing was added.
            AggregationError: if the residual would pass its bound, and may not be truncated.
        """
        self._products.require_some()
        before = self._state.adapter
        tensors, missing, divisions = self._products.with_dense_mean(), {}, []
        for pair in before.pairs():
            division = self._divide(self, pair)
            factors = held(division.factors, before.spec)
            tensors |= factors
            missing[pair.module.name] = difference(division.whole, pair, factors)
            divisions.append(division)
        adapter = replace(before, tensors=tensors)
        truncate = self._bound.overflow == "truncate"
        grown = grow(self._state.residual, missing, adapter, max_rank=self._bound.max_rank, truncate=truncate)
        state = replace(self._state, adapter=adapter, residual=grown.residual)
        result = self._products.result(state, metrics={**self._report(divisions), **_size(grown)})
        return replace(result, rule_state=self._remember)


def _size(grown: Growth) -> dict[str, float]:
    tensors = grown.residual.tensors.values() if grown.residual else ()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {"residual_rank": float(grown.rank), "residual_bytes": float(size), "residual_kept": grown.kept}
