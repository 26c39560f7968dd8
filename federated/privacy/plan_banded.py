"""What `mechanism=banded` would do to a run's noise, from numbers alone; a part of `federated.privacy.plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from federated.privacy.banded import column_norm, prefix_noise
from federated.privacy.server_budget import ServerBudget

__all__ = ["BandedPlan", "plan_banded"]


@dataclass(frozen=True)
class BandedPlan:
    """Noise that goes on from round to round, beside independent noise of the same epsilon.

    Noise is its standard deviation on each value of a sum of clipped updates, in clipping norms.

    Args:
        groups: that take turns.
        participations: of one client, at most.
        band: rounds that are correlated.
        column_norm: by how much more noise is drawn than is accounted for.
        noise_of_a_round: on one round's sum, the largest.
        noise_of_the_last_sum: on the sum of all rounds: what is in the last adapter.
        noise_of_the_sums: root of the mean square over the sums of the first 1, 2, 3 ... rounds.
        independent: the same for independent noise in the same groups.
        everybody: the same for independent noise where any client may be in any round, without sampling.
    """

    groups: int
    participations: int
    band: int
    column_norm: float
    noise_of_a_round: float
    noise_of_the_last_sum: float
    noise_of_the_sums: float
    independent: float
    everybody: float


def plan_banded(budget: ServerBudget, rounds: int) -> BandedPlan | None:
    """The plan of a run whose groups take turns; None where there is one group.

    Args:
        budget: of the run.
        rounds: of the run.
    """
    if budget.groups == 1:
        return None
    noise, participations = budget.noise_multiplier, math.ceil(rounds / budget.groups)
    found, alone = prefix_noise(budget.band, rounds), prefix_noise(1, rounds)
    return BandedPlan(
        budget.groups,
        participations,
        budget.band,
        column_norm(budget.band),
        noise * found.one_round,
        noise * found.last_sum,
        noise * found.all_sums,
        noise * alone.all_sums,
        # Gaussians compose by their precisions: all rounds in place of the participations take so much more noise.
        noise * math.sqrt(rounds / participations) * alone.all_sums,
    )
