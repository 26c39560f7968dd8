"""What rules that withstand hostile clients share: one round's updates on disk, the check of their number, one result.

    u_k = what client k changed, in factor or product space (`federated.aggregation.spaces`)
    u'_k = mean of the n - f nearest to u_k, where ``nnm`` is asked for
    next = before + statistic(u'_1, ..., u'_n)

The statistic is the rule's own `Robust.combine`: weights from the inner products of the u_k
(`federated.aggregation.filters`), or a statistic of each coordinate (`federated.aggregation.coordinates`). Each client
counts once: a claimed number of examples would be a weight that a hostile client chooses. Dense tensors (head, norms,
biases) take the same weights, or the same statistic.

None of it holds against more than f hostile clients, and none of it sees a change that looks like an honest one: the
result stays among the honest updates, no more. Mixing: Allouah et al., "Fixing by Mixing: A Recipe for Optimal
Byzantine ML under Heterogeneity", AISTATS 2023, algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.factor_mean import plan_groups, require_first_phase
from federated.aggregation.filters import nearest_mixing
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.aggregation.spaces import Combination, FactorSpace, ProductSpace, Space
from federated.config import STRICT
from federated.delta import Update, apply, is_finite
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.lowrank import decompose, effective, stack
from federated.manifest import AdapterSpec, TrainPlan
from federated.residual import factors_from
from federated.state import AdapterState, RuleState

__all__ = ["CoordinateRobust", "Robust"]

_GROUPS = ("factor_a", "factor_b", "dense")


@dataclass(frozen=True, config=STRICT)
class Robust:
    """A rule that withstands some hostile clients; each one is a subclass with its own `combine`.

    Args:
        byzantine: f, the number of hostile clients in one round that the rule withstands.
        space: where updates are compared: ``product`` (effective updates) or ``factor`` (in one basis).
        nnm: average each update with its nearest ones before anything else: for clients with different data.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    least: ClassVar[tuple[int, int]] = (2, 1)
    """Fewest updates of one round as ``(a, b)`` of ``a f + b``."""

    byzantine: Annotated[int, Field(ge=0)] = 1
    space: Literal["factor", "product"] = "product"
    nnm: bool = False

    @property
    def properties(self) -> RuleProperties:
        """What it is and what it goes with; the number of updates that it needs depends on f."""
        factor, more = self.least
        return RuleProperties(
            exactness="approximate",
            space=self.space,
            linear=False,
            needs_individual_updates=True,
            fixed_space=False,
            paper=self.paper,
            gauge="immune",
            robust=True,
            min_updates=factor * self.byzantine + more,
            min_updates_why=f"n >= {factor} f + {more} with f = strategy.options.byzantine = {self.byzantine}",
            memory="one layer of all clients",
        )

    def combine(self, gram: Tensor) -> Combination:
        """The rule itself.

        Args:
            gram: inner products of the updates, float64 [n, n].
        """
        raise NotImplementedError

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """It remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the global adapter, at its rank."""
        return plan_groups(state, client, phase, _GROUPS)

    def start(self, state: GlobalState, phase: int) -> _Gathered:
        """A fresh collection.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase(self.name, phase)
        return _Gathered(self, state)


@dataclass(frozen=True, config=STRICT)
class CoordinateRobust(Robust):
    """A robust rule that needs the coordinates themselves, which only factors have."""

    space: Literal["factor", "product"] = "factor"

    def __post_init__(self) -> None:
        """Refuse the space that has no coordinates.

        Raises:
            ConfigError: for ``space=product``.
        """
        if self.space == "product":
            raise ConfigError(
                f"strategy.options.space = 'product': {self.name} takes a statistic of each coordinate, and those of "
                "an effective update are the dense d x d product, which is never formed; use space=factor, or a rule "
                "that weighs whole updates (krum, multi_krum, geometric_median, centered_clipping, norm_bound)"
            )


class _Gathered:
    """One round's updates, until all are there."""

    def __init__(self, rule: Robust, state: GlobalState) -> None:
        self._rule = rule
        self._state = state
        self._received = state.materialise()
        space = FactorSpace if rule.space == "factor" else ProductSpace
        self._space: Space = space(self._received)

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update; its weight is checked and does not count.

        Raises:
            AggregationError: if it does not hold exactly the adapter's tensors, or holds values that are not finite;
                nothing is taken in then.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise AggregationError(f"weight {weight} of an update: expected a finite number > 0")
        after = apply(self._received, update.delta)
        if not is_finite(after.tensors):
            raise AggregationError(f"the update of {update.client_id} holds values that are not finite")
        self._space.spool.put(update.client_id, self._space.encode(after, update.delta))

    def finish(self) -> Result:
        """The next adapter; reports how many updates there were, and what the rule says of them.

        Raises:
            NotEnoughUpdates: if there are fewer than the rule's guarantee needs.
        """
        count, before = len(self._space.spool.client_ids), self._state.adapter
        self._require(count)
        how, tensors, kept, energy = self._combination(), dict(before.tensors), 0.0, 0.0
        for received, pair in zip(self._received.pairs(), before.pairs(), strict=True):
            found = decompose(stack([effective(pair), self._space.change(received, how)]))
            tensors |= factors_from(found, pair)
            kept, energy = kept + found.kept(pair.module.rank) * found.energy, energy + found.energy
        for name, tensor in before.dense().items():
            every = self._space.spool.stacked(name)
            tensors[name] = (tensor.double() + how.reduce(every)).float()
        metrics = {"updates": float(count), **how.metrics, "energy_kept": kept / energy if energy else 1.0}
        state = replace(self._state, adapter=replace(before, tensors=tensors))
        return Result(state=state, participants=count, total_weight=float(count), metrics=metrics)

    def _combination(self) -> Combination:
        gram = self._space.gram()
        if not self._rule.nnm:
            return self._rule.combine(gram)
        mixing = nearest_mixing(gram, self._rule.byzantine)
        return self._rule.combine(mixing @ gram @ mixing.T).of_mixed(mixing)

    def _require(self, count: int) -> None:
        properties = self._rule.properties
        if count < properties.min_updates:
            raise NotEnoughUpdates(
                f"{count} good updates: {self._rule.name} needs at least {properties.min_updates} "
                f"({properties.min_updates_why})"
            )
