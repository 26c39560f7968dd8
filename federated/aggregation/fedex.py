"""FedEx-LoRA: average the factors, and put what that gets wrong into a frozen residual.

    A = sum_k p_k A_k,    B = sum_k p_k B_k,    W_0 <- W_0 + (sum_k p_k s B_k A_k - s B A)

Exact. The difference is the mean of ``s (B_k - B)(A_k - A)``: K clients of rank r give it a rank of up to (K - 1) r,
and one client, or clients that agree, none at all. Here it goes into the residual, a second adapter that is kept
compact: the base model never changes, so that a quantised or shared one can be used.

Options:

    residual            ``full``; or ``truncated``: of each round's difference only the best part of rank
                        ``residual_rank``. No residual of that rank is closer, given the averaged factors; as an
                        answer to the dense sum it is approximate, and ``energy_kept`` says which share of the
                        difference's energy it keeps.
    residual_rank       for ``truncated`` only.
    max_residual_rank   of the residual after all rounds; 0 for none.
    overflow            ``refuse`` the round above that rank, or ``truncate`` the residual: then approximate.

Where we differ: the paper's server adds the difference to the base weights that it sends; the factors that are
subtracted are those that a device holds, so what a bfloat16 adapter rounds off is in the residual too. Dense tensors
are averaged.

Source: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models",
ACL 2025, sections 3 and 4.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from federated.aggregation.factor_mean import plan_groups, require_first_phase
from federated.aggregation.growing import Bound, Division, Growing, MaxRank, Overflow, difference, energy_kept, held
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.config.parts import STRICT
from federated.errors import ConfigError
from federated.global_state import GlobalState
from federated.lowrank import LowRank, decompose, effective, stack
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, LoraPair, RuleState, Tensors

__all__ = ["FedEx"]

_GROUPS = ("factor_a", "factor_b", "dense")


@dataclass(frozen=True, config=STRICT)
class FedEx:
    """Weighted mean of the factors, and a residual that makes it exact.

    Args:
        residual: ``full`` or ``truncated``.
        residual_rank: of one round's difference, for ``truncated``.
        max_residual_rank: of the residual in any layer; 0 means no bound.
        overflow: ``refuse`` or ``truncate``.

    Raises:
        ConfigError: for a ``residual_rank`` without ``truncated``, or the other way round.
    """

    residual: Literal["full", "truncated"] = "full"
    residual_rank: Annotated[int, Field(ge=0)] = 0
    max_residual_rank: MaxRank = 0
    overflow: Overflow = "refuse"

    name = "fedex"

    def __post_init__(self) -> None:
        """Check that the options go together."""
        if (self.residual == "truncated") != (self.residual_rank > 0):
            raise ConfigError(
                f"strategy.options.residual_rank = {self.residual_rank}: truncated needs one of at least 1, full takes "
                f"none (strategy.options.residual = {self.residual!r})"
            )

    @property
    def properties(self) -> RuleProperties:
        """Exact, unless something may be truncated."""
        lossless = self.residual == "full" and Bound(self.max_residual_rank, self.overflow).lossless
        return RuleProperties(
            exactness="exact" if lossless else "approximate",
            space="product",
            linear=False,
            fixed_space=False,
            residual=True,
            asynchronous="same_basis",
            paper="Singhal et al. 2024, arXiv:2410.09432",
        )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FedEx-LoRA remembers nothing but the residual, which is part of the global state."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, from the global adapter and its residual, at the adapter's rank."""
        return plan_groups(state, client, phase, _GROUPS)

    def start(self, state: GlobalState, phase: int) -> Growing:
        """A fresh collection.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FedEx-LoRA", phase)
        bound = Bound(self.max_residual_rank, self.overflow)
        if self.residual == "full":
            return Growing(state, _averaged, bound=bound)
        return Growing(state, self._cut, bound=bound, report=lambda made: {"energy_kept": energy_kept(made)})

    def _cut(self, growing: Growing, pair: LoraPair) -> Division:
        """The averaged factors, with the best part of the difference."""
        whole = _averaged(growing, pair)
        found = decompose(difference(whole.whole, pair, whole.factors))
        rank = self.residual_rank
        best = LowRank(found.u[:, :rank] * found.s[:rank], found.v[:, :rank].T)
        name = pair.module.name
        mean = pair._replace(factor_a=whole.factors[f"{name}.factor_a"], factor_b=whole.factors[f"{name}.factor_b"])
        kept = found.kept(rank) * found.energy
        return Division(whole.factors, stack([effective(mean), best]), kept=kept, energy=found.energy, rank=rank)


def _averaged(growing: Growing, pair: LoraPair) -> Division:
    """The averaged factors, as devices hold them, and all of the mean product."""
    name = pair.module.name
    factor_a, factor_b = torch.zeros_like(pair.factor_a).double(), torch.zeros_like(pair.factor_b).double()
    for share, one in growing.factors_of(name):
        factor_a += share * one.factor_a
        factor_b += share * one.factor_b
    factors: Tensors = {f"{name}.factor_a": factor_a.float(), f"{name}.factor_b": factor_b.float()}
    return Division(held(factors, growing.spec), growing.mean(name))
