"""Multi-Krum: average the updates that lie closest to most of the others.

    score_k = sum of |u_k - u_j|^2 over the n - f - 2 nearest j,    next = before + mean of u_k of the m lowest scores

m = n - f - 2 unless ``keep`` says otherwise; a larger m has no proof. It withstands f hostile clients among
n >= 2 f + 3, and keeps most of what the others sent.

Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
section 5. Where we differ: as `federated.aggregation.krum`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.filters import chosen, krum_scores
from federated.aggregation.protocol import RuleProperties
from federated.aggregation.robust import Robust
from federated.aggregation.spaces import Combination
from federated.config import STRICT

__all__ = ["MultiKrum"]


@dataclass(frozen=True, config=STRICT)
class MultiKrum(Robust):
    """The mean of the m best scores; further options as in `Robust`.

    Args:
        keep: m; 0 means n - f - 2.
    """

    name = "multi_krum"
    paper = "Blanchard et al. 2017, arXiv:1703.02757"
    least = (2, 3)

    keep: Annotated[int, Field(ge=0)] = 0

    @property
    def properties(self) -> RuleProperties:
        """As `Robust`; keeping m updates needs m + f + 2 of them."""
        found, needed = super().properties, self.keep + self.byzantine + 2
        if needed <= found.min_updates:
            return found
        why = f"n >= keep + f + 2 with keep = {self.keep} and f = strategy.options.byzantine = {self.byzantine}"
        return replace(found, min_updates=needed, min_updates_why=why)

    def combine(self, gram: Tensor) -> Combination:
        """Equal weights on the lowest scores."""
        count = self.keep or len(gram) - self.byzantine - 2
        return Combination.weighted(chosen(krum_scores(gram, self.byzantine), count))
