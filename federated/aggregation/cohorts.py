"""How large a cohort is."""

from __future__ import annotations

import math

__all__ = ["cohort_size", "planned_cohort"]


def cohort_size(clients: int, fraction: float) -> int:
    """Clients in a round when so many are there: ``ceil(fraction * clients)``, at least one.

    >>> cohort_size(10, 0.25), cohort_size(10, 0.01)
    (3, 1)
    """
    return min(clients, max(1, math.ceil(fraction * clients - 1e-9)))


def planned_cohort(clients: int, fraction: float, *, sampling: str) -> float:
    """The cohort that a round with client-level privacy divides by.

    >>> planned_cohort(10, 0.25, sampling="none"), planned_cohort(10, 0.25, sampling="poisson")
    (3.0, 2.5)

    Args:
        clients: the population.
        fraction: ``selection.fraction``.
        sampling: ``privacy.client.sampling``; ``poisson`` cohorts are as large only on average.
    """
    return fraction * clients if sampling == "poisson" else float(cohort_size(clients, fraction))
