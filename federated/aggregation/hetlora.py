"""HetLoRA: clients of different ranks share the first rows; factors are padded with zeros and averaged by their weight.

    down   A_k = first r_k rows of A,   B_k = first r_k columns of B
    up     A = sum_k w_k pad(A_k),      B = sum_k w_k pad(B_k),      w_k = ||dW_k|| / sum_j ||dW_j||

where ``dW_k = s_k B_k A_k`` is client k's effective update over all layers, ``||.||`` the Frobenius norm, and ``pad``
fills up with zeros to the adapter's rank. Approximate by design: cross terms as in FedIT, and rows that few clients
train are drawn to zero by the others' padding. Who sends a larger update counts more: bound it with round.max_norm.

Rank self-pruning (``prune_gamma``, 0 is off): with ``t_k = max(1, floor(gamma r_k))`` a client's training may be
penalised on its tail, and it goes on at rank t_k when the tail became smaller than it was sent:

    loss + tail_penalty * sum_l ||B_k[:, t_k:]|| ||A_k[t_k:]||;    r_k <- t_k  if  that sum after < before

What is pruned is not averaged. Ranks only fall, and are remembered by client id with each version.

Where we differ: clients of different ranks have different scalings ``s_k = alpha / r_k``. Factors are brought to the
adapter's scaling s first: ``(s_k / s) B_k`` goes in, and ``(s / s_k)`` times the columns of B go down, so that a client
starts from the effective update that its rows have in the adapter. A is the same at every rank, as it was initialised.
The pruning decision is taken from the update by the server, which knows both sides of it; the paper's clients take the
same one. Dense tensors are averaged by the usual weights. A round in which every dW_k is zero uses these for all.

Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.factor_mean import require_first_phase
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.config.parts import STRICT
from federated.delta import Update, apply, is_finite
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.lowrank import effective, norm_of
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, LoraPair, RuleState, Tensors
from federated.sums import WeightedSum

__all__ = ["HetLoRA", "first_rows"]

_GROUPS = ("factor_a", "factor_b", "dense")
_HEAVIEST = 1e200
"""Of one weight: times any float32 it is far from float64's end."""


@dataclass(frozen=True, config=STRICT)
class HetLoRA:
    """Zero-padded factors, averaged by the norm of each client's effective update.

    Args:
        prune_gamma: share of its rank that a client keeps when it is pruned, below 1; 0 never prunes.
        tail_penalty: weight of the penalty on the rest while clients train; needs ``prune_gamma``.
    """

    prune_gamma: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tail_penalty: Annotated[float, Field(ge=0)] = 0.0

    name = "hetlora"

    def __post_init__(self) -> None:
        """Refuse a penalty on a tail that nobody has.

        Raises:
            ConfigError: for ``tail_penalty`` without ``prune_gamma``.
        """
        if self.tail_penalty and not self.prune_gamma:
            raise ConfigError(
                f"strategy.options.tail_penalty = {self.tail_penalty:g}: the tail starts at prune_gamma times a "
                "client's rank; give strategy.options.prune_gamma too, such as 0.75"
            )

    @property
    def properties(self) -> RuleProperties:
        """Where ranks are pruned, clients that declare the same rank may be sent different ones."""
        return RuleProperties(
            exactness="approximate",
            space="factor",
            linear=False,
            mixed_ranks=True,
            own_payloads=self.prune_gamma > 0,
            paper="Cho et al. 2024, arXiv:2401.06432",
        )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """Nobody is pruned yet."""
        return RuleState({"ranks": {}})

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the first rows of the adapter, as many as the client trains now.

        Raises:
            AggregationError: for a rank below 1 or above the adapter's, or another rule's state.
        """
        declared = state.adapter.spec.rank if client.rank is None else client.rank
        rank = min(declared, _ranks(state).get(client.client_id, declared))
        payload = first_rows(state.adapter, rank)
        plan = TrainPlan(phase=phase, rank=rank, trainable=_GROUPS)
        if self.tail_penalty:
            plan = replace(plan, tail_penalty=self.tail_penalty, tail_start=self.kept_of(rank))
        return plan, payload.cast(payload.spec.dtype)

    def start(self, state: GlobalState, phase: int) -> _Padded:
        """A fresh mean.

        Raises:
            AggregationError: for a phase other than 1, or another rule's state.
        """
        require_first_phase("HetLoRA", phase)
        return _Padded(state, self)

    def kept_of(self, rank: int) -> int:
        """The rank after pruning; the same where nothing is pruned."""
        return max(1, math.floor(self.prune_gamma * rank + 1e-9)) if self.prune_gamma else rank


def _ranks(state: GlobalState) -> Mapping[str, int]:
    ranks = state.rule_state.scalars.get("ranks")
    if not isinstance(ranks, Mapping):
        raise AggregationError("the state was not made by HetLoRA: it remembers no ranks")
    return ranks


def first_rows(adapter: AdapterState, rank: int) -> AdapterState:
    """The first rows of A and columns of B as an adapter of a smaller rank, with the effective update that they have.

    Dense tensors are shared.

    Raises:
        AggregationError: for a rank below 1 or above the adapter's.
    """
    if not 1 <= rank <= adapter.spec.rank:
        raise AggregationError(f"rank {rank} was asked of an adapter of rank {adapter.spec.rank}: expected 1 to that")
    if rank == adapter.spec.rank:
        return adapter
    spec = adapter.spec.with_rank(rank)
    tensors = dict(adapter.tensors)
    for pair, module in zip(adapter.pairs(), spec.modules, strict=True):
        ratio = pair.scaling / spec.scaling(module)
        tensors[f"{module.name}.factor_a"] = pair.factor_a[: module.rank].clone()
        tensors[f"{module.name}.factor_b"] = pair.factor_b[:, : module.rank] * ratio
    return replace(adapter, spec=spec, tensors=tensors)


class _Padded:
    """Running means of padded factors by norm, and of dense tensors by weight."""

    def __init__(self, state: GlobalState, rule: HetLoRA) -> None:
        self._state = state
        self._rule = rule
        self._ranks = dict(_ranks(state))
        self._pruned: dict[str, int] = {}
        self._weights: dict[str, float] = {}
        self._trained: dict[str, int] = {}
        self._factors, self._idle, self._dense = WeightedSum(), WeightedSum(), WeightedSum()

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Raises:
            AggregationError: if it does not hold exactly the tensors that its client was sent, or for a bad weight;
                nothing is taken in then.
        """
        received = update.received or self._state.materialise()
        after = self._checked(update, received, weight)
        rank = self._rank_after(received, after)
        norm = math.sqrt(sum(norm_of(effective(_cut(pair, rank))) ** 2 for pair in after.pairs()))
        padded: dict[str, Tensor] = {}
        for pair, before in zip(received.pairs(), self._state.adapter.pairs(), strict=True):
            padded |= _padded(update.delta, pair, before, rank)
        (self._factors if norm else self._idle).add(padded, norm or weight)
        dense = {name: update.delta[name] for name in received.dense()}
        if dense:
            self._dense.add(dense, weight)
        self._weights[update.client_id], self._trained[update.client_id] = weight, received.spec.rank
        if rank < received.spec.rank:
            self._pruned[update.client_id] = rank

    def _checked(self, update: Update, received: AdapterState, weight: float) -> AdapterState:
        """What the client holds now, once nothing is left that could fail half way."""
        after = apply(received, update.delta)
        if not is_finite(after.tensors):
            raise AggregationError(f"the update of {update.client_id} leads to values that are not finite")
        if update.client_id in self._weights:
            raise AggregationError(f"two updates of {update.client_id} in one round: expected one")
        if not 0 < weight < _HEAVIEST:
            raise AggregationError(f"weight {weight} of an update: expected a finite number > 0")
        return after

    def _rank_after(self, received: AdapterState, after: AdapterState) -> int:
        """The client's rank from now on: the kept one where its tail shrank."""
        kept = self._rule.kept_of(received.spec.rank)
        shrank = _tail(after, kept) < _tail(received, kept)
        return kept if shrank else received.spec.rank

    def finish(self) -> Result:
        """The mean delta, and who trains at a smaller rank from now on.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        if not self._weights:
            raise NotEnoughUpdates("no update to combine: expected at least one good update")
        mean = (self._factors if self._factors.count else self._idle).mean()
        ranks = [self._pruned.get(client_id, rank) for client_id, rank in self._trained.items()]
        metrics = {"pruned": float(len(self._pruned)), "mean_rank": sum(ranks) / len(ranks)}
        return Result(
            mean_delta={**mean, **(self._dense.mean() if self._dense.count else {})},
            rule_state=RuleState({"ranks": {**self._ranks, **self._pruned}}),
            participants=len(self._weights),
            total_weight=math.fsum(self._weights.values()),
            metrics=metrics,
        )


def _cut(pair: LoraPair, rank: int) -> LoraPair:
    """The first rows and columns at the scaling that the pair has."""
    return pair._replace(factor_a=pair.factor_a[:rank], factor_b=pair.factor_b[:, :rank])


def _tail(adapter: AdapterState, start: int) -> float:
    """``sum_l ||B_l[:, start:]|| ||A_l[start:]||``."""
    tails = ((pair.factor_b[:, start:].double(), pair.factor_a[start:].double()) for pair in adapter.pairs())
    return sum(float(left.norm() * right.norm()) for left, right in tails)


def _padded(delta: Tensors, pair: LoraPair, before: LoraPair, rank: int) -> dict[str, Tensor]:
    """One layer's move of the global factors: the client's on its first rows, and to zero on the others.

    The rows that a client was sent are the global ones, up to the rounding of its dtype: its delta moves the float32
    master itself, so that small steps add up there.
    """
    name, ratio = pair.module.name, pair.scaling / before.scaling
    count = min(rank, pair.module.rank)
    factor_a, factor_b = -before.factor_a.double(), -before.factor_b.double()
    factor_a[:count] = delta[f"{name}.factor_a"][:count].double()
    factor_b[:, :count] = delta[f"{name}.factor_b"][:, :count].double() * ratio
    return {f"{name}.factor_a": factor_a, f"{name}.factor_b": factor_b}
