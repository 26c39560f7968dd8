"""Error feedback for truncations: what a rank could not hold, kept as a low-rank matrix of each layer for the next sum.

    found = mean + E,    E <- found - (found truncated to r),  itself truncated to a bound

It is plain tensors in a rule's memory: saved with each version, sent to nobody. Used by rules that truncate.

Sources: Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes", ICML 2019, algorithm 2.
"""

from __future__ import annotations

import math

from torch import Tensor

from federated.lowrank import LowRank, Spectrum, stack
from federated.residual import used_rank
from federated.state import Tensors

__all__ = ["Remainder"]

_LEFT, _RIGHT = "remainder_left", "remainder_right"


class Remainder:
    """What is carried from one round to the next.

    Args:
        tensors: as kept in the rule's memory.
        rank: largest rank of what is kept in each layer; 0 keeps nothing.

    Attributes:
        tensors: what to remember, float32.
    """

    def __init__(self, tensors: Tensors, rank: int) -> None:
        self._before = tensors if rank else {}
        self._rank = rank
        self.tensors: dict[str, Tensor] = {}
        self._largest = 0
        self._carried = self._lost = 0.0

    def added_to(self, layer: str, product: LowRank) -> LowRank:
        """``product + E`` of one layer, in stacked form."""
        left, right = self._before.get(f"{layer}.{_LEFT}"), self._before.get(f"{layer}.{_RIGHT}")
        if left is None or right is None:
            return product
        return stack([product, LowRank(left.double(), right.double())])

    def keep(self, layer: str, found: Spectrum, rank: int) -> None:
        """Carry what is beyond the first ``rank`` directions, as far as the bound allows."""
        end = min(rank + self._rank, used_rank(found))
        self._carried += float(found.s[rank:end].square().sum())
        self._lost += float(found.s[max(rank, end) :].square().sum())
        if end > rank:
            self._largest = max(self._largest, end - rank)
            root = found.s[rank:end].sqrt()
            self.tensors[f"{layer}.{_LEFT}"] = (found.u[:, rank:end] * root).float()
            self.tensors[f"{layer}.{_RIGHT}"] = (root[:, None] * found.v[:, rank:end].T).float()

    def metrics(self, energy: float) -> dict[str, float]:
        """Its largest rank, and its norm and that of what the bound cut off, relative to the sum's.

        Args:
            energy: the squared norm of the sum over all layers.
        """
        if not self._rank:
            return {}
        size = energy or 1.0
        return {
            "remainder_rank": float(self._largest),
            "remainder_carried": math.sqrt(self._carried / size),
            "remainder_lost": math.sqrt(self._lost / size),
        }
