"""The clipping norm that follows a quantile of the clients' norms.

    C  <-  C exp(-rate (b - quantile)),      b = 1/2 + (1/m) ( sum_k (1[||d_k|| <= C] - 1/2) + N(0, s_b^2) )

b is the noised share of updates that were not clipped, over the planned cohort m. One client moves the shifted count by
1/2 at most, so that its noise has the multiplier 2 s_b. Count and updates are two Gaussian mechanisms on one cohort;
the updates get the multiplier

    z_updates = (z^-2 - (2 s_b)^-2)^(-1/2)

with which both together are exactly one mechanism of multiplier z: z is what is accounted.

Source: Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, algorithm 1, theorem 1.
Where we differ: a client that did not come counts as one half, so that the share is over the planned cohort, like the
mean.
"""

from __future__ import annotations

import math

from federated.errors import PrivacyError

__all__ = ["count_noise", "following_clip_norm", "multiplier_of_updates"]

_SHARE = 0.05
"""Of the cohort: the paper's noise on the count."""
_SMALLEST, _LARGEST = 1e-9, 1e9


def count_noise(configured: float, planned: float) -> float:
    """Standard deviation of the noise on the count of unclipped updates.

    Args:
        configured: ``privacy.client.quantile_noise``; 0: a twentieth of the cohort.
        planned: the planned cohort.
    """
    return configured or _SHARE * planned


def multiplier_of_updates(noise_multiplier: float, noise_on_count: float) -> float:
    """The multiplier of the noise on the updates, so that they and the count together have the accounted one.

    Args:
        noise_multiplier: the accounted one, z.
        noise_on_count: standard deviation s_b.

    Raises:
        PrivacyError: if the count alone spends more than z allows.
    """
    left = noise_multiplier**-2 - (2 * noise_on_count) ** -2
    if left <= 0:
        raise PrivacyError(
            f"privacy.client.quantile_noise: {noise_on_count:g} on the count of unclipped clients spends all of the "
            f"noise multiplier {noise_multiplier:g}, and nothing is left for the updates: more than "
            f"{noise_multiplier / 2:g} is needed; raise it, use larger cohorts, or privacy.client.clipping=fixed"
        )
    return 1 / math.sqrt(left)


def following_clip_norm(clip_norm: float, unclipped: float, *, quantile: float, rate: float) -> float:
    """The next round's clipping norm.

    Args:
        clip_norm: this round's.
        unclipped: noised share of updates that were not clipped.
        quantile: the share that is wanted, in (0, 1).
        rate: geometric learning rate, > 0.

    Returns:
        Within [1e-9, 1e9], whatever the noise was.
    """
    step = min(50.0, max(-50.0, rate * (unclipped - quantile)))
    return min(_LARGEST, max(_SMALLEST, clip_norm * math.exp(-step)))
