"""Who takes part in a round: a cohort from (seed, round_number) and stable client ids alone.

Clients are ranked by a hash of (seed, round_number, client_id): the cohort does not depend on the order in which
clients connected, on Flower's node ids or on any global random numbers, and is the same on every engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from federated.aggregation import cohort_size

__all__ = ["select_cohort"]


def select_cohort(client_ids: Collection[str], *, fraction: float, seed: int, round_number: int) -> tuple[str, ...]:
    """Sample ``ceil(fraction * n)`` clients without replacement, at least one, sorted by name.

    >>> select_cohort(["a", "b", "c"], fraction=1.0, seed=0, round_number=1)
    ('a', 'b', 'c')

    Args:
        client_ids: who is there.
        fraction: in (0, 1].
        seed: of the run.
        round_number: 1-based.
    """

    def rank(client_id: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{round_number}\0{client_id}".encode()).digest()

    size = cohort_size(len(client_ids), fraction)
    return tuple(sorted(sorted(set(client_ids), key=rank)[:size]))
