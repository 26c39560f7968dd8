"""FLoRIST: decompose the clients' stacked factors, and keep as many directions as hold a share of the energy.

    U S V^T = sum_k p_k s_k B_k A_k,    p = the smallest with  sum_{i <= p} S_i^2 >= threshold * sum_i S_i^2

Each layer keeps its own p. The best r of the p directions are the next adapter; those beyond its rank go into the
frozen residual, so that the threshold alone says what is lost:

    ||next - dW||^2 <= (1 - threshold) ||dW||^2        in each layer

Approximate, by that much; exact with a threshold of 1. Clients may have any rank. The d x d product is never formed:
`federated.lowrank` works on the stacked factors.

Options:

    threshold           share of the energy in (0, 1].
    max_residual_rank   0 for none.
    overflow            ``refuse`` the round above that rank, or ``truncate`` the residual.

Reports ``energy_kept``, and p over the layers: ``rank_kept`` (mean) and ``rank_kept_most``.

Where we differ: the paper gives all clients one pair of global adapters of rank p, whatever their own rank; here a
client trains at its own rank and has the other directions frozen beside it, which are the same weights. Each product
has its own scaling. Directions that are cut off leave the rows of A that were there, with B zero, so that they can be
trained again. Dense tensors are averaged.

Source: Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models", 2025, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic.dataclasses import dataclass

from federated.aggregation.factor_mean import require_first_phase
from federated.aggregation.growing import Bound, Division, Growing, MaxRank, Overflow, energy_kept, plan_whole
from federated.aggregation.protocol import ClientView, RuleProperties
from federated.config.parts import STRICT, Fraction
from federated.global_state import GlobalState
from federated.lowrank import LowRank, Spectrum, decompose, rank_for_energy
from federated.manifest import AdapterSpec, TrainPlan
from federated.residual import factors_from
from federated.state import AdapterState, LoraPair, RuleState

__all__ = ["FLoRIST"]


@dataclass(frozen=True, config=STRICT)
class FLoRIST:
    """The mean of the products, cut at a share of its energy.

    Args:
        threshold: share of each layer's energy that is kept, in (0, 1].
        max_residual_rank: of the residual in any layer; 0 means no bound.
        overflow: ``refuse`` or ``truncate``.
    """

    threshold: Fraction = 0.9
    max_residual_rank: MaxRank = 0
    overflow: Overflow = "refuse"

    name = "florist"

    @property
    def properties(self) -> RuleProperties:
        """Approximate, unless everything is kept."""
        lossless = self.threshold == 1.0 and Bound(self.max_residual_rank, self.overflow).lossless
        return RuleProperties(
            exactness="exact" if lossless else "approximate",
            space="product",
            linear=False,
            mixed_ranks=True,
            fixed_space=False,
            residual=True,
            asynchronous="same_basis",
            gauge="immune",
            paper="Ramesh and Dass 2025, arXiv:2506.09199",
        )

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """FLoRIST remembers nothing but the residual, which is part of the global state."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train every group, at the client's own rank."""
        return plan_whole(state, client, phase)

    def start(self, state: GlobalState, phase: int) -> Growing:
        """A fresh collection.

        Raises:
            AggregationError: for a phase other than 1.
        """
        require_first_phase("FLoRIST", phase)
        return Growing(state, self._cut, bound=Bound(self.max_residual_rank, self.overflow), report=_report)

    def _cut(self, growing: Growing, pair: LoraPair) -> Division:
        mean = growing.mean(pair.module.name)
        found = decompose(mean)
        if self.threshold == 1.0:  # not even what rounding left is cut off
            return Division(factors_from(found, pair), mean, found.energy, found.energy, len(found.s))
        rank = rank_for_energy(found, self.threshold)
        best = Spectrum(found.u[:, :rank], found.s[:rank], found.v[:, :rank])
        kept = LowRank(best.u * best.s, best.v.T)
        return Division(factors_from(best, pair), kept, best.energy, found.energy, rank)


def _report(divisions: Sequence[Division]) -> Mapping[str, float]:
    ranks = [one.rank for one in divisions]
    return {
        "energy_kept": energy_kept(divisions),
        "rank_kept": sum(ranks) / len(ranks),
        "rank_kept_most": float(max(ranks)),
    }
