"""Geometric median (RFA): the point with the smallest sum of distances to the updates.

    v = argmin_v sum_k |u_k - v|,    by Weiszfeld: v <- sum_k w_k u_k,  w_k ~ 1 / max(nu, |u_k - v|)

Every update counts, those far away the less the farther they are: in the end each pulls with the same force. It
withstands f hostile clients among n >= 2 f + 1, and needs to know no f: ``byzantine`` is checked only (and used by
``nnm``).

Source: Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning", IEEE TSP 2022, algorithm 2. Where
we differ: clients count equally; nu is relative to the distance between updates, not absolute; iterations end when v is
still, not after three.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.filters import geometric_median
from federated.aggregation.robust import Robust
from federated.aggregation.spaces import Combination
from federated.config import STRICT

__all__ = ["GeometricMedian"]


@dataclass(frozen=True, config=STRICT)
class GeometricMedian(Robust):
    """The geometric median by smoothed Weiszfeld; further options as in `Robust`.

    Args:
        smoothing: nu as a share of the distance between updates.
        iterations: at most that many.
    """

    name = "geometric_median"
    paper = "Pillutla et al. 2022, arXiv:1912.13445"

    smoothing: Annotated[float, Field(gt=0, le=1)] = 1e-6
    iterations: Annotated[int, Field(ge=1)] = 1000

    def combine(self, gram: Tensor) -> Combination:
        """Weights by closeness."""
        return Combination.weighted(geometric_median(gram, self.smoothing, self.iterations))
