"""FedASK: the best rank-r approximation of the mean product, from two exchanges whose messages are sums.

    phase 1   clients train and send    Y_k = s_k B_k (A_k Omega)        Q = qr(sum_k p_k Y_k)
    phase 2   the server sends Q        Z_k = s_k A_k^T (B_k^T Q)        U S V^T = Q (sum_k p_k Z_k)^T
              B A = U_r S_r V_r^T / s

With Omega of c = r + oversample random columns, shared by a seed. Where c is no less than the rank of the mean, that is
all of it, and the next adapter is what FlexLoRA would make: an optimal truncation. Where c is smaller, it is nearly
that (Halko, Martinsson and Tropp 2011); ``uncovered_layers`` says in how many layers this may be so, and ``oversample``
is the remedy: K clients of rank r need (K - 1) r. Clients of any ranks go together: their products have one shape.

The server needs only sums, which secure aggregation can give. In phase 2 clients answer from the factors that they
trained in phase 1, without training again. If one of them is lost in between, Q is of a sum that nobody can complete:
the survivors sketch again in phase 3 and project in phase 4, also without training, and so on; the strategy bounds it.
Dense tensors go up with the sketch and are averaged, over those who are in the round to its end.

Where we differ: the scaling s_k is multiplied in by the client, so that clients of different ranks can be summed. The
columns of Omega are made orthonormal, which changes no span, and are drawn anew each round. `round.max_norm` bounds
what is sent: the norm of a sketch, no larger than that of the effective update.

Privacy:
    Both messages of a client are computed from the same factors; noise for one of them does not cover the other.

Source: Wen et al., "Differentially Private Federated Low Rank Adaptation Beyond Fixed-Matrix", 2025 (FedASK).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.protocol import ClientView, NextPhase, Result, RuleProperties
from federated.config.parts import STRICT
from federated.delta import Update
from federated.errors import AggregationError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.lowrank import decompose
from federated.manifest import AdapterSpec, TensorLayout, TrainPlan, digest_of
from federated.residual import factors_from
from federated.sketches import rebuilt
from federated.state import AdapterState, RuleState, group_of
from federated.sums import WeightedSum
from federated.uploads import layout

__all__ = ["FedASK"]

_GROUPS = ("factor_a", "factor_b", "dense")
_MEAN = "mean:"
_ALL = "everybody"
_NOISE = 1e-5
"""A singular value below this share of the largest is what rounding to float32 left."""


@dataclass(frozen=True, config=STRICT)
class FedASK:
    """Two sketches of the mean product, and its truncation from them.

    Args:
        oversample: columns of the sketch beyond the adapter's rank.
        seed: of the random columns.
    """

    oversample: Annotated[int, Field(ge=0)] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    name = "fedask"
    properties = RuleProperties(
        exactness="truncation",
        space="product",
        linear=True,
        mixed_ranks=True,
        phases=2,
        fixed_space=False,
        paper="Wen et al. 2025, arXiv:2507.09990",
        gauge="immune",
        memory="the sum of all sketches",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """The first turn: each draws its own random columns."""
        return RuleState({"turn": 0})

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Phase 1: train, and send a sketch. Later odd phases: sketch again. Even ones: project onto the basis.

        Raises:
            AggregationError: for a rank that the adapter does not have, or another rule's state.
        """
        rank = state.adapter.spec.rank if client.rank is None else client.rank
        plan = TrainPlan(phase=phase, rank=rank, trainable=_GROUPS, upload="projection", cached=phase > 1)
        if phase % 2:
            columns = state.adapter.spec.rank + self.oversample
            seed = int(digest_of([self.seed, _turn(state)])[:12], 16)
            plan = replace(plan, upload="sketch", sketch_columns=columns, sketch_seed=seed)
        return plan, state.materialise(client.rank) if phase == 1 else _beside(state, rank, phase)

    def start(self, state: GlobalState, phase: int) -> _Sketches | _Projections:
        """A fresh sum of sketches or of projections.

        Raises:
            AggregationError: for a state of another rule or phase.
        """
        plan, payload = self.plan(state, ClientView(_ALL), phase)
        expected = layout(plan, payload)
        return _Sketches(state, phase, expected) if phase % 2 else _Projections(state, phase, expected)


def _turn(state: GlobalState) -> int:
    turn = state.rule_state.scalars.get("turn")
    if type(turn) is not int:
        raise AggregationError("the state was not made by FedASK: it counts no turns")
    return turn


def _beside(state: GlobalState, rank: int, phase: int) -> AdapterState:
    """What a client needs besides the factors that it holds: the dense tensors' shapes, or the basis."""
    spec = state.adapter.spec
    spec = spec if rank == spec.rank else spec.with_rank(rank)
    if phase % 2:
        return AdapterState(spec, state.adapter.cast(spec.dtype).dense())
    bases = {name: one for name, one in state.rule_state.tensors.items() if not name.startswith(_MEAN)}
    if not bases:
        raise AggregationError(f"phase {phase} of FedASK needs the basis that phase {phase - 1} makes, found none")
    return AdapterState(spec, {}, extra=bases)


class _Sum:
    """A weighted sum of messages of one layout, one of each client."""

    def __init__(self, state: GlobalState, phase: int, expected: TensorLayout) -> None:
        self._state = state
        self._phase = phase
        self._expected = {entry.name: entry.shape for entry in expected}
        self._sum = WeightedSum()
        self._weights: dict[str, float] = {}

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted message.

        Raises:
            AggregationError: if it does not hold exactly what was asked for, or for a bad weight; the sum is unchanged.
        """
        found = {name: tuple(tensor.shape) for name, tensor in update.delta.items()}
        if found != self._expected:
            odd = sorted(dict(found.items() ^ self._expected.items()))
            raise AggregationError(f"update of {update.client_id} does not fit phase {self._phase}: {odd[:3]}")
        if update.client_id in self._weights:
            raise AggregationError(f"two updates of {update.client_id} in one phase: expected one")
        self._check_weight(update.client_id, weight)
        self._sum.add(update.delta, weight)
        self._weights[update.client_id] = weight

    def _check_weight(self, client_id: str, weight: float) -> None:
        """Any weight will do where nothing is known of it yet."""


class _Sketches(_Sum):
    """Phase 1, and any later one that starts over."""

    def finish(self) -> NextPhase:
        """The basis of the mean sketch, for the next phase.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        means = self._sum.mean()
        layers = [module.name for module in self._state.adapter.spec.modules]
        tensors = {f"{layer}.basis": torch.linalg.qr(means.pop(f"{layer}.sketch")).Q.float() for layer in layers}
        tensors |= {f"{_MEAN}{name}": mean for name, mean in means.items()}
        memory = RuleState({"turn": _turn(self._state), "weights": dict(self._weights)}, tensors)
        return NextPhase(replace(self._state, rule_state=memory), self._phase + 1)


class _Projections(_Sum):
    """Phase 2, and any later one that follows a sketch."""

    def _check_weight(self, client_id: str, weight: float) -> None:
        """Both sums are of the same clients with the same weights."""
        known = self._known.get(client_id)
        if weight != known:
            raise AggregationError(f"weight {weight} of {client_id}, expected {known} as in phase {self._phase - 1}")

    @property
    def _known(self) -> Mapping[str, float]:
        weights: Mapping[str, float] = self._state.rule_state.scalars["weights"]
        return weights

    def finish(self) -> NextPhase | Result:
        """The next adapter, or a new start with those who are left.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        if not self._weights:
            raise NotEnoughUpdates("no projection to combine: expected at least one good update")
        turn = _turn(self._state)
        if self._known.keys() - self._weights.keys():
            return NextPhase(replace(self._state, rule_state=RuleState({"turn": turn})), self._phase + 1)
        tensors, metrics = self._truncated()
        adapter = replace(self._state.adapter, tensors={**self._state.adapter.tensors, **tensors})
        return Result(
            state=replace(self._state, adapter=adapter, rule_state=RuleState({"turn": turn + 1})),
            participants=len(self._weights),
            total_weight=math.fsum(self._weights.values()),
            metrics={**metrics, "sketches": self._phase / 2},
        )

    def _truncated(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        before, known, means = self._state.adapter, self._state.rule_state.tensors, self._sum.mean()
        tensors = {
            name: (before.tensors[name].double() + known[f"{_MEAN}{name}"]).float()
            for name in before.tensors
            if group_of(name) == "dense"
        }
        kept = energy = uncovered = 0.0
        for pair in before.pairs():
            name, rank = pair.module.name, pair.module.rank
            found = decompose(rebuilt(known[f"{name}.basis"], means[f"{name}.projection"]))
            tensors |= factors_from(found, pair)
            kept, energy = kept + found.kept(rank) * found.energy, energy + found.energy
            full = len(found.s) < min(pair.module.d_in, pair.module.d_out)
            uncovered += full and bool(found.s[-1] > _NOISE * found.s[0])
        return tensors, {"energy_kept": kept / energy if energy else 1.0, "uncovered_layers": uncovered}
