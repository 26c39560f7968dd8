"""Krum: take the one update that lies closest to most of the others.

    score_k = sum of |u_k - u_j|^2 over the n - f - 2 nearest j,    next = before + u_k of the lowest score

It withstands f hostile clients among n >= 2 f + 3. The price is that all other updates are thrown away: the result is
as noisy as one client's, and far from clients whose data differ; `multi_krum` averages, and ``nnm`` mixes first.

Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
section 4. Where we differ: distances are those of effective updates, unless ``space=factor``
(`federated.aggregation.spaces`).
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.filters import chosen, krum_scores
from federated.aggregation.robust import Robust
from federated.aggregation.spaces import Combination
from federated.config import STRICT

__all__ = ["Krum"]


@dataclass(frozen=True, config=STRICT)
class Krum(Robust):
    """The update closest to its nearest others; options as in `Robust`."""

    name = "krum"
    paper = "Blanchard et al. 2017, arXiv:1703.02757"
    least = (2, 3)

    def combine(self, gram: Tensor) -> Combination:
        """All weight on the lowest score."""
        return Combination.weighted(chosen(krum_scores(gram, self.byzantine), 1))
