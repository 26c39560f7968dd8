"""Centred clipping: pull towards each update, but by no more than a radius, and again from there.

    v <- v + 1/n sum_k (u_k - v) min(1, tau / |u_k - v|),    from v = 0 (nothing changed)

A hostile client moves the result by at most tau / n in an iteration. Without a radius of your own, tau is the median of
the distances from v, anew in each iteration, which no minority can raise: so it withstands f hostile clients among
n >= 2 f + 1.

Source: Karimireddy, He and Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021, algorithm 2.
Where we differ: v starts at zero and not at the last round's result, whose basis is gone, and takes more iterations in
return; clients send no momentum; the radius may follow the updates.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from federated.aggregation.filters import centered
from federated.aggregation.robust import Robust
from federated.aggregation.spaces import Combination
from federated.config import STRICT

__all__ = ["CenteredClipping"]


@dataclass(frozen=True, config=STRICT)
class CenteredClipping(Robust):
    """Bounded pulls towards each update; further options as in `Robust`.

    Args:
        radius: tau, an L2 norm; 0 takes the median distance of the round.
        iterations: at most that many.
    """

    name = "centered_clipping"
    paper = "Karimireddy et al. 2021, arXiv:2012.10333"

    radius: Annotated[float, Field(ge=0)] = 0.0
    iterations: Annotated[int, Field(ge=1)] = 20

    def combine(self, gram: Tensor) -> Combination:
        """Weights of the last iteration."""
        return Combination.weighted(centered(gram, self.radius, self.iterations))
