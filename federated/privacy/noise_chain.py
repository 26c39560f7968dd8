"""The noise of a round that goes on from the rounds before, and what of it the next rounds need.

    n_t = z_t - sum_{0<i<p} c_i n_{t-i}        see `federated.privacy.banded`

Whoever knows n_t takes it off what round t gave out, and holds the exact sum of the clients' updates. So a history is
as secret as what it protects: it goes to no client, into no version and no log, and is kept in one file that the
server's owner alone can read (`federated.flower.noise_keeper`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from federated.errors import PrivacyError
from federated.privacy.banded import coefficients, inverse_column

__all__ = ["NoiseChain", "NoiseHistory", "Place"]


@dataclass(frozen=True)
class Place:
    """Where a round stands: what its noise may go on from, and what may go on from it.

    Args:
        round_number: 1-based.
        before: mark of the budget before this round was charged.
        after: the same with its charge. A mark never comes again.
        std: accounted standard deviation, z C.
        band: p.
    """

    round_number: int
    before: str
    after: str
    std: float
    band: int


@dataclass(frozen=True)
class NoiseHistory:
    """The noise of the last rounds of a block.

    Args:
        place: of the last of them.
        rows: rounds of the block so far.
        tensors: name to float32 [rounds kept, *shape], newest first; at most p - 1 are kept.

    Privacy: not for anybody but the server.
    """

    place: Place
    rows: int
    tensors: Mapping[str, Tensor] = field(repr=False)

    def broken_by(self, following: Place) -> str:
        """Why a round's noise may not go on from this; empty where it may."""
        last = self.place
        if following.round_number != last.round_number + 1:
            return f"the noise that is kept is that of round {last.round_number}"
        if following.before != last.after:
            return f"round {following.round_number} or another one was charged before, and not published"
        if (following.std, following.band) != (last.std, last.band):
            return "the scale of the noise is not that of the rounds before"
        return ""


class NoiseChain:
    """One round's noise.

    Args:
        place: of the round.
        history: what it goes on from; None starts anew.

    Attributes:
        row: of the round in its block, 1-based.

    Raises:
        PrivacyError: for a history that this round may not go on from.
    """

    def __init__(self, place: Place, history: NoiseHistory | None = None) -> None:
        if history is not None and history.broken_by(place):
            raise PrivacyError(f"noise cannot go on: {history.broken_by(place)}")
        self.place = place
        self.row = 1 if history is None else history.rows + 1
        self._history = {} if history is None else dict(history.tensors)
        self._made: dict[str, Tensor] = {}

    @property
    def growth(self) -> float:
        """Standard deviation of this round's noise, in units of the fresh noise."""
        return math.sqrt(math.fsum(one * one for one in inverse_column(self.place.band, self.row)))

    def draw(self, name: str, fresh: Tensor) -> Tensor:
        """``n_t`` of one tensor, float64, rounded to float32 as it is kept.

        Args:
            name: of the tensor.
            fresh: ``z_t``.

        Raises:
            PrivacyError: if the rounds before had another shape under that name, or none.
        """
        earlier = self._earlier(name, fresh)
        made = fresh.double()
        for weight, one in zip(coefficients(self.place.band)[1:], earlier, strict=False):
            made = made - weight * one.double()
        kept = made.float()
        self._made[name] = torch.cat([kept.unsqueeze(0), earlier])[: self.place.band - 1]
        return kept.double()

    def _earlier(self, name: str, fresh: Tensor) -> Tensor:
        if self.row == 1:
            return torch.zeros((0, *fresh.shape))
        found = self._history.get(name)
        if found is None or found.shape != (min(self.row, self.place.band) - 1, *fresh.shape):
            raise PrivacyError(f"the noise of the rounds before does not fit the tensor {name}: start a new run")
        return found

    def history(self) -> NoiseHistory:
        """What the next round goes on from, once this one is published."""
        return NoiseHistory(self.place, self.row, self._made)
