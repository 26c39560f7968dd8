"""FlexLoRA: average the effective updates themselves, and give back their best approximation of the adapter's rank.

    dW = sum_k p_k s_k B_k A_k,    U S V^T = dW,    B = U_r (S_r / s)^1/2,    A = (S_r / s)^1/2 V_r^T

with client k's own rank r_k and scaling s_k = alpha / r_k. Each client is sent the best approximation of the global
adapter at its own rank (`GlobalState.materialise`).

Optimal truncation: no adapter of rank r is closer to dW (Eckart and Young). The d x d product is never formed:
`federated.lowrank` works on the stacked factors. The share of dW's energy that rank r keeps is reported each round.

With ``error_feedback`` (Seide et al. 2014; Karimireddy et al. 2019) what rank r could not hold is not lost but carried:

    next = truncated(dW + E),    E <- dW + E - next,  cut to ``error_rank``

The remainder E stays on the server: it is saved with each version and sent to nobody. How large it is, and what its own
bound cut off, is reported. What a client of a smaller rank is not sent is another matter, and not in E.

Where we differ: the paper's code puts the singular values on one side and runs a dense SVD; here both factors get
their root, so that both train at like pace, and directions that dW does not use keep the rows of A that they had (B
is zero there): with both zero they could never be trained again. Dense tensors are averaged.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024, section 3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from federated.aggregation.factor_mean import plan_groups, require_first_phase
from federated.aggregation.products import ProductMean
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.aggregation.remainder import Remainder
from federated.config.parts import STRICT
from federated.delta import Update
from federated.errors import ConfigError
from federated.global_state import GlobalState
from federated.lowrank import decompose
from federated.manifest import AdapterSpec, TrainPlan
from federated.residual import factors_from
from federated.state import AdapterState, RuleState

__all__ = ["FlexLoRA"]

_GROUPS = ("factor_a", "factor_b", "dense")


@dataclass(frozen=True, config=STRICT)
class FlexLoRA:
    """Weighted mean of the products, truncated to the adapter's rank.

    Args:
        error_feedback: carry what that rank could not hold over to the next round's sum.
        error_rank: largest rank of what is carried; 0 means the adapter's.
    """

    error_feedback: bool = False
    error_rank: Annotated[int, Field(ge=0)] = 0

    name = "flexlora"
    properties = RuleProperties(
        exactness="truncation",
        space="product",
        linear=False,
        mixed_ranks=True,
        fixed_space=False,
        asynchronous="same_basis",
        paper="Bai et al. 2024, arXiv:2402.11505",
        gauge="immune",
        memory="the sum of one layer's products",
    )

    def __post_init__(self) -> None:
        """Refuse a bound on what is not carried.

        Raises:
            ConfigError: for ``error_rank`` without ``error_feedback``.
        """
        if self.error_rank and not self.error_feedback:
            raise ConfigError(
                f"strategy.options.error_rank = {self.error_rank}: nothing is carried without error feedback; set "
                "strategy.options.error_feedback=true too"
            )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """Nothing is carried yet."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the closest adapter of the client's rank."""
        return plan_groups(state, client, phase, _GROUPS, mixed_ranks=True)

    def start(self, state: GlobalState, phase: int) -> _Truncated:
        """A fresh collection.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FlexLoRA", phase)
        rank = (self.error_rank or state.adapter.spec.rank) if self.error_feedback else 0
        return _Truncated(state, Remainder(state.rule_state.tensors, rank))


class _Truncated:
    """The mean of the products and what was carried, and their best approximation as the next adapter."""

    def __init__(self, state: GlobalState, remainder: Remainder) -> None:
        self._state = state
        self._remainder = remainder
        self._products = ProductMean(state)

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Raises:
            AggregationError: if it does not hold exactly the adapter's tensors; nothing is taken in then.
        """
        self._products.add(update, weight)

    def finish(self) -> Result:
        """The truncated mean as the next adapter; reports ``energy_kept``, the share of its energy in it.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        self._products.require_some()
        before = self._state.adapter
        tensors, kept, energy = self._products.with_dense_mean(), 0.0, 0.0
        for pair in before.pairs():
            name, rank = pair.module.name, pair.module.rank
            found = decompose(self._remainder.added_to(name, self._products.mean(name)))
            self._remainder.keep(name, found, rank)
            tensors |= factors_from(found, pair)
            kept, energy = kept + found.kept(rank) * found.energy, energy + found.energy
        result = self._products.result(
            replace(self._state, adapter=replace(before, tensors=tensors)),
            metrics={"energy_kept": kept / energy if energy else 1.0, **self._remainder.metrics(energy)},
        )
        return replace(result, rule_state=RuleState(tensors=self._remainder.tensors))
