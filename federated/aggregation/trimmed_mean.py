"""Trimmed mean: each coordinate is the mean of what the clients send, without the f smallest and the f largest.

    next_i = before_i + mean of u_k,i without its f smallest and f largest values

It withstands f hostile clients among n > 2 f.

Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, definition 2.
Where we differ: f is a number, not a share; coordinates are those of the factors in the canonical gauge
(`federated.aggregation.gauge`).
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.coordinates import trimmed_mean
from federated.aggregation.robust import CoordinateRobust
from federated.aggregation.spaces import Combination
from federated.config import STRICT

__all__ = ["TrimmedMean"]


@dataclass(frozen=True, config=STRICT)
class TrimmedMean(CoordinateRobust):
    """The mean of each coordinate without its extremes; options as in `Robust`."""

    name = "trimmed_mean"
    paper = "Yin et al. 2018, arXiv:1803.01498"

    def combine(self, gram: Tensor) -> Combination:
        """Without f values on either side."""
        count = float(len(gram) - 2 * self.byzantine)
        return Combination(lambda every: trimmed_mean(every, self.byzantine), metrics={"kept_per_coordinate": count})
