"""Coordinate median: each coordinate of the next adapter is the middle of what the clients send.

    next_i = before_i + median_k u_k,i

It withstands f hostile clients among n >= 2 f + 1, and needs to know no f to do so: ``byzantine`` is checked only
(and used by ``nnm``). Where clients' data differ, the middle of each coordinate may be nobody's update.

Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, definition 1.
Where we differ: coordinates are those of the factors in the canonical gauge (`federated.aggregation.gauge`).
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.coordinates import median
from federated.aggregation.robust import CoordinateRobust
from federated.aggregation.spaces import Combination
from federated.config import STRICT

__all__ = ["CoordinateMedian"]


@dataclass(frozen=True, config=STRICT)
class CoordinateMedian(CoordinateRobust):
    """The median of each coordinate; options as in `Robust`."""

    name = "median"
    paper = "Yin et al. 2018, arXiv:1803.01498"

    def combine(self, gram: Tensor) -> Combination:
        """The middle value or two."""
        return Combination(median, metrics={"kept_per_coordinate": float(2 - len(gram) % 2)})
