"""How large a cohort is."""

from __future__ import annotations

import math

from federated.config import ClientPrivacyConfig
from federated.privacy.fixed_groups import groups_of

__all__ = ["cohort_size", "planned_cohort"]


def cohort_size(clients: int, fraction: float) -> int:
    """Clients in a round when so many are there: ``ceil(fraction * clients)``, at least one.

    >>> cohort_size(10, 0.25), cohort_size(10, 0.01)
    (3, 1)
    """
    return min(clients, max(1, math.ceil(fraction * clients - 1e-9)))


def planned_cohort(clients: int, fraction: float, client: ClientPrivacyConfig) -> float:
    """The cohort that a round with client-level privacy divides by.

    >>> planned_cohort(10, 0.25, ClientPrivacyConfig())
    2.5
    >>> planned_cohort(10, 0.25, ClientPrivacyConfig(mechanism="banded"))
    2.5

    Args:
        clients: the population.
        fraction: ``selection.fraction``.
        client: of client-level privacy; its cohorts are as large only on average, since each client is in one or not
            whoever else there is.
    """
    if client.mechanism == "banded":
        return clients / groups_of(client, fraction)
    return fraction * clients
