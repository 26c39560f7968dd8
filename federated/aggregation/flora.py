"""FLoRA: stack the clients' factors, so that the sum of their products is exact, and freeze it.

    dW = [p_1 s_1 B_1 | p_2 s_2 B_2 | ...] [A_1 ; A_2 ; ...],    W_0 <- W_0 + dW,    A fresh and random, B = 0

Exact, at any mix of ranks. Here the frozen sum is the residual, a second adapter that is kept compact: the base model
never changes. It goes down whole each round and grows by up to ``sum_k r_k`` directions, to at most a layer's smaller
side; up goes one adapter.

Options:

    start               ``reinit`` as in the paper; or ``warm``: the adapter keeps the best rank-r part of dW, and only
                        the remainder is frozen. Re-initialising costs what the adapter has learnt to move along, which
                        hurts with few local steps and many rounds; ``warm`` goes on from there.
    seed                of the fresh A's, drawn as the first ones are (uniform within 1 / sqrt(d_in)).
    max_residual_rank   0 for none.
    overflow            ``refuse`` the round above that rank, or ``truncate`` the residual: then approximate.

Where we differ: each product has its own scaling; the paper's clients merge the stack into their base weights, which
drifts with their dtype and cannot be undone. Dense tensors are averaged.

Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024, section 3.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, validate_call

from federated.aggregation.factor_mean import require_first_phase
from federated.aggregation.growing import Bound, Division, Growing, MaxRank, Overflow, plan_whole
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.config.parts import STRICT
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.lowrank import decompose
from federated.manifest import AdapterSpec, TrainPlan, digest_of
from federated.residual import factors_from
from federated.state import AdapterState, LoraPair, RuleState, Tensors

__all__ = ["FLoRA"]


class FLoRA:
    """The sum of the clients' products, frozen beside the adapter.

    Args:
        start: ``reinit`` or ``warm``.
        seed: of the fresh factors.
        max_residual_rank: of the residual in any layer; 0 means no bound.
        overflow: ``refuse`` or ``truncate``.
    """

    name = "flora"

    @validate_call(config=STRICT)
    def __init__(
        self,
        *,
        start: Literal["reinit", "warm"] = "reinit",
        seed: Annotated[int, Field(ge=0)] = 0,
        max_residual_rank: MaxRank = 0,
        overflow: Overflow = "refuse",
    ) -> None:
        self._warm = start == "warm"
        self._seed = seed
        self._bound = Bound(max_residual_rank, overflow)

    @property
    def properties(self) -> RuleProperties:
        """Exact, unless the residual may be truncated."""
        return RuleProperties(
            exactness="exact" if self._bound.lossless else "approximate",
            space="product",
            linear=False,
            mixed_ranks=True,
            fixed_space=False,
            residual=True,
            asynchronous="same_basis",
            gauge="immune",
            paper="Wang et al. 2024, arXiv:2409.05976",
        )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """The generator of fresh factors: its seed, and how often they were drawn."""
        return RuleState({"seed": self._seed, "drawn": 0})

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, at the client's own rank."""
        return plan_whole(state, client, phase)

    def start(self, state: GlobalState, phase: int) -> Growing:
        """A fresh collection.

        Raises:
            AggregationError: for a phase other than 1, or another rule's state.
        """
        require_first_phase("FLoRA", phase)
        if self._warm:
            return Growing(state, _keep_best, bound=self._bound)
        seed, drawn = _generator(state)
        return Growing(
            state,
            lambda growing, pair: Division(_fresh(pair, seed, drawn), growing.mean(pair.module.name)),
            bound=self._bound,
            remember=RuleState({"seed": seed, "drawn": drawn + 1}),
        )


def _generator(state: GlobalState) -> tuple[int, int]:
    found = [state.rule_state.scalars.get(name) for name in ("seed", "drawn")]
    if not all(type(number) is int for number in found):
        raise AggregationError(f"the state was not made by FLoRA: seed and drawn are {found}, expected whole numbers")
    return int(found[0] or 0), int(found[1] or 0)


def _keep_best(growing: Growing, pair: LoraPair) -> Division:
    mean = growing.mean(pair.module.name)
    return Division(factors_from(decompose(mean), pair), mean)


def _fresh(pair: LoraPair, seed: int, drawn: int) -> Tensors:
    """A random A and B zero: the same for the same seed, draw and layer, whatever happened before."""
    name = pair.module.name
    generator = torch.Generator().manual_seed(int(digest_of([seed, drawn, name])[:16], 16) >> 1)
    bound = pair.module.d_in**-0.5
    factor_a = torch.empty(pair.factor_a.shape).uniform_(-bound, bound, generator=generator)
    return {f"{name}.factor_a": factor_a, f"{name}.factor_b": torch.zeros(pair.factor_b.shape)}
