"""Norm bounding: shrink updates that are too large, then average.

    next = before + 1/n sum_k u_k min(1, c / |u_k|)

A hostile client moves the result by at most c / n, in any direction it likes: f of them by f c / n. That stops updates
that are scaled up, and no more than that. Without a bound of your own, c is the median of the round's norms, which no
minority of n >= 2 f + 1 can raise.

Source: Sun et al., "Can You Really Backdoor Federated Learning?", 2019, section 4. Where we differ: c may follow the
updates; no noise is added.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.filters import bounded
from federated.aggregation.robust import Robust
from federated.aggregation.spaces import Combination
from federated.config import STRICT

__all__ = ["NormBound"]


@dataclass(frozen=True, config=STRICT)
class NormBound(Robust):
    """The mean of updates of bounded norm; further options as in `Robust`.

    Args:
        bound: c, an L2 norm; 0 takes the median norm of the round.
    """

    name = "norm_bound"
    paper = "Sun et al. 2019, arXiv:1911.07963"

    bound: Annotated[float, Field(ge=0)] = 0.0

    def combine(self, gram: Tensor) -> Combination:
        """Equal shares, shrunk where an update is too large; reports how many were."""
        weights = bounded(gram, self.bound)
        shrunk = float((weights * len(gram) < 1.0).sum())
        return Combination.weighted(weights, clipped=shrunk)
