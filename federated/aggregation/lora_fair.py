"""LoRA-FAIR: average the factors, then correct B so that the product comes close to the mean of the products.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   T = sum_k p_k B_k A_k
    cosine   dB = argmin  1 - cos(T, (B + dB) A) + strength * ||dB||^2
    ridge    dB = argmin  ||T - (B + dB) A||^2 + strength * ||dB||^2 = (T - B A) A^T (A A^T + strength I)^-1

and the next round starts from ``A`` and ``B + dB``. Without the layer's scaling, which is the same on both sides: every
client has the adapter's rank. Approximate by design: with A fixed, no dB reaches a T of a higher rank. How far from T
the product of the means was, and how far the corrected one is, is reported (``gap_mean`` and ``gap``, relative to T).

``cosine`` is the paper's. It leaves the product's length to the penalty alone, while ``ridge``, ours, has both in one
closed form and never is farther from T than the means. ``strength`` is in units of each objective: near 0 it lets dB go
as far as it helps; a large one gives FedIT.

Where we differ: the paper descends by SGD over d x d products. Here the objective is written in ``T A^T`` and in
``A A^T``, its possible minima are known up to two numbers, and those are searched by L-BFGS in float64, from dB = 0.
Dense tensors are averaged.

Source: Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV 2025,
section 4.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.factor_mean import plan_groups, require_first_phase
from federated.aggregation.product_fit import by_cosine, by_ridge
from federated.aggregation.products import ProductMean
from federated.aggregation.protocol import ClientView, Result, RuleProperties
from federated.config.parts import STRICT
from federated.delta import Update
from federated.global_state import GlobalState
from federated.lowrank import LowRank, norm_of, stack
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, LoraPair, RuleState

__all__ = ["LoRAFAIR"]

_GROUPS = ("factor_a", "factor_b", "dense")


@dataclass(frozen=True, config=STRICT)
class LoRAFAIR:
    """Weighted mean of the factors with a correction of B.

    Args:
        objective: ``cosine`` (the paper's) or ``ridge`` (closed form).
        strength: lambda, what the correction's squared norm costs.
    """

    objective: Literal["cosine", "ridge"] = "cosine"
    strength: Annotated[float, Field(ge=0)] = 0.01

    name = "lora_fair"
    properties = RuleProperties(
        exactness="approximate",
        space="product",
        linear=False,
        paper="Bian et al. 2025, arXiv:2411.14961",
        memory="the sum of one layer's products",
    )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """LoRA-FAIR remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the global adapter, at its rank."""
        return plan_groups(state, client, phase, _GROUPS)

    def start(self, state: GlobalState, phase: int) -> _Corrected:
        """A fresh collection.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("LoRA-FAIR", phase)
        return _Corrected(state, self)


class _Corrected:
    """Means of factors and of products, and the correction between them."""

    def __init__(self, state: GlobalState, rule: LoRAFAIR) -> None:
        self._state = state
        self._correct = by_cosine if rule.objective == "cosine" else by_ridge
        self._strength = rule.strength
        self._products = ProductMean(state)

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Raises:
            AggregationError: if it does not hold exactly the adapter's tensors; nothing is taken in then.
        """
        self._products.add(update, weight)

    def finish(self) -> Result:
        """The mean delta with the correction in it.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        self._products.require_some()
        delta, gaps = self._products.dense_delta(), torch.zeros(3, dtype=torch.float64)
        for pair in self._state.materialise().pairs():
            name = pair.module.name
            factor_a, factor_b = self._means(name)
            target = self._products.mean(name).scaled(1.0 / pair.scaling)
            moved = factor_b + self._correct(target, factor_a, factor_b, strength=self._strength)
            gaps += _squares(target, factor_a, (factor_b, moved)) * pair.scaling**2
            delta |= _moves(pair, factor_a, moved)
        size, before, after = (math.sqrt(float(one)) for one in gaps)
        metrics = {"gap_mean": before / (size or 1.0), "gap": after / (size or 1.0)}
        return self._products.result(mean_delta=delta, metrics=metrics)

    def _means(self, layer: str) -> tuple[Tensor, Tensor]:
        """``sum_k p_k A_k`` and ``sum_k p_k B_k`` of one layer, float64, in the order of client ids."""
        weights = self._products.weights
        total = sum(weight for _, weight in sorted(weights.items()))
        factor_a = factor_b = torch.zeros((), dtype=torch.float64)
        for client_id, pair in self._products.each_pair(layer):
            share = weights[client_id] / total
            factor_a = factor_a + share * pair.factor_a.double()
            factor_b = factor_b + share * pair.factor_b.double()
        return factor_a, factor_b


def _moves(pair: LoraPair, factor_a: Tensor, factor_b: Tensor) -> dict[str, Tensor]:
    name = pair.module.name
    return {
        f"{name}.factor_a": factor_a - pair.factor_a.double(),
        f"{name}.factor_b": factor_b - pair.factor_b.double(),
    }


def _squares(target: LowRank, factor_a: Tensor, candidates: tuple[Tensor, Tensor]) -> Tensor:
    """Squared norms of T, and of its distances from two products."""
    found = [norm_of(stack([target, LowRank(-factor_b, factor_a)])) for factor_b in candidates]
    return torch.tensor([norm_of(target), *found], dtype=torch.float64).square()
