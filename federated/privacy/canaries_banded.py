"""Canaries through correlated noise, for an adversary who knows how it is correlated and undoes it.

Beside `federated.privacy.canaries`. All canaries are in the group whose turn comes first, which is the worst that the
account has to cover; the other groups' rounds are noise alone, and tell about the noise. In the released rows R a
canary of one participation in round t is plain, but its noise is known in part from the rows around. So the adversary
looks at

    W = L R    (rows of independent noise, where the canary is c_0 .. c_{p-1} times itself in the rows t .. t+p-1)
    M_t = sum_j c_j W_{t+j}

which is the best linear guess, and adds up over the canary's rounds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from federated.privacy.audit import Floats
from federated.privacy.banded import coefficients
from federated.privacy.canaries import sign_of
from federated.privacy.chance import NoiseSource
from federated.privacy.client_level import NoisySum
from federated.privacy.noise_chain import NoiseChain, NoiseHistory, Place
from federated.state import Tensors

__all__ = ["BandedPath"]


class BandedPath:
    """What a round with correlated noise does to its updates: take the group's, clip, sum, noise.

    Args:
        shapes: of an update.
        clip_norm: the bound.
        noise_multiplier: the accounted one.
        planned: the planned cohort.
        source: of the noise.
        groups: that take turns; the members that it is given are in the first one.
        band: rounds that are correlated; more than the groups would be a fault.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        clip_norm: float,
        noise_multiplier: float,
        planned: float,
        source: NoiseSource,
        groups: int,
        band: int,
    ) -> None:
        self._shapes = shapes
        self._parts = {"clip_norm": clip_norm, "noise_multiplier": noise_multiplier, "planned": planned}
        self._std = clip_norm * noise_multiplier
        self._source = source
        self._groups = groups
        self._band = band
        self._history: NoiseHistory | None = None
        self._step = 0

    def __call__(self, members: Mapping[str, Tensors]) -> Tensors:
        """One round's release."""
        before, self._step = self._step, self._step + 1
        chain = NoiseChain(Place(self._step, f"{before}", f"{self._step}", self._std, self._band), self._history)
        noisy = NoisySum(self._shapes, **self._parts, source=self._source, chain=chain)
        if self._takes_part(before):
            for name in members:
                noisy.add(members[name])
        mean = noisy.release().mean
        self._history = chain.history()
        return mean

    def views(self, scores: Floats) -> dict[str, Floats]:
        """What the adversary sees who undoes the noise's correlation; `scores` have their signs turned back."""
        kept = np.asarray(coefficients(self._band))
        signs = np.asarray([sign_of(step) for step in range(len(scores))])[:, None]
        whitened = _filtered(signs * scores, kept)
        matched = signs * _filtered(whitened[::-1], kept)[::-1]
        turns = [step for step in range(len(scores)) if self._takes_part(step)]
        return {"all steps together, correlation undone": matched[turns].sum(axis=0)}

    def _takes_part(self, step: int) -> bool:
        return step % self._groups == 0


def _filtered(rows: Floats, weights: Floats) -> Floats:
    """``sum_i weights_i rows_{t-i}`` for each row t."""
    made = np.zeros_like(rows)
    for lag, weight in enumerate(weights[: len(rows)]):
        made[lag:] += weight * rows[: len(rows) - lag]
    return made
