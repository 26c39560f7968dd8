"""Bulyan: Krum picks most of the updates one by one, then each coordinate is averaged around its median.

    S = n - 2 f picks of Krum, each among those that are left
    next_i = before_i + mean of the n - 4 f values u_k,i, k in S, nearest to their median

Krum alone lets one coordinate of a chosen update be far off in many dimensions; the second step does not. It withstands
f hostile clients among n >= 4 f + 3.

Source: El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018,
section 4. Where we differ: the median of an even number is the mean of the two middle values; where fewer than f + 3
are left to pick from, a score is the distance to the nearest one; coordinates are those of the factors in the canonical
gauge (`federated.aggregation.gauge`).
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.coordinates import around_median
from federated.aggregation.filters import peeled
from federated.aggregation.robust import CoordinateRobust
from federated.aggregation.spaces import Combination
from federated.config import STRICT

__all__ = ["Bulyan"]


@dataclass(frozen=True, config=STRICT)
class Bulyan(CoordinateRobust):
    """Krum's picks, averaged around their median; options as in `Robust`."""

    name = "bulyan"
    paper = "El Mhamdi et al. 2018, arXiv:1802.07927"
    least = (4, 3)

    def combine(self, gram: Tensor) -> Combination:
        """Pick, then average what is nearest to the median."""
        picks = len(gram) - 2 * self.byzantine
        taken, count = peeled(gram, self.byzantine, picks), picks - 2 * self.byzantine

        def reduce(every: Tensor) -> Tensor:
            return around_median(every[taken], count)

        return Combination(reduce, metrics={"filtered_out": 2.0 * self.byzantine, "kept_per_coordinate": float(count)})
