"""Who takes part in a round: an order of the clients from (seed, round_number) and stable client ids.

Chance is a hash of (seed, round_number, client_id): the order does not depend on who connected first, on Flower's node
ids or on any global random numbers, and is the same on every engine. Two policies also look at what the server learnt
of its clients in earlier rounds (`Standing`), which is saved with each version: a resumed run asks the same clients.

    uniform        the order of the hashes: every cohort is equally likely
    round_robin    one fixed order; each round goes on where the last one ended
    by_examples    weighted sampling without replacement, by the examples that a client trains on
    availability   the same, by how often it answered well of late

Weighted sampling takes the smallest of the keys ``-log(1 - u) / weight`` with u from the hash: the next one is drawn
with a probability that is its share of the weight that is left (Efraimidis and Spirakis, "Weighted random sampling with
a reservoir", 2006). Equal weights give exactly the order of ``uniform``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from federated.aggregation import cohort_size

__all__ = ["POLICIES", "Standing", "order_clients", "select_cohort"]

_REMEMBERED = 8
"""Answers of a client that count for its availability."""


@dataclass(frozen=True)
class Standing:
    """What the server knows of a client from earlier rounds.

    Args:
        examples: training examples of its last good update (its own claim); 0 while there is none.
        answers: the last times that it was asked, at most 8, newest last: whether its update was good.
    """

    examples: int = 0
    answers: tuple[bool, ...] = ()

    def after(self, *, good: bool, examples: int = 0) -> Standing:
        """The standing once another round has asked this client."""
        return replace(self, examples=examples if good else self.examples, answers=(*self.answers, good)[-_REMEMBERED:])

    @property
    def availability(self) -> float:
        """``(1 + good answers) / (1 + times asked)`` over the last 8: in [1/9, 1], and 1 for a newcomer.

        It never reaches zero, so that a client that was away is asked again now and then.
        """
        return (1 + sum(self.answers)) / (1 + len(self.answers))


Standings = Mapping[str, Standing]
_NONE: Standings = MappingProxyType({})


def select_cohort(
    client_ids: Collection[str],
    *,
    fraction: float,
    seed: int,
    round_number: int,
    policy: str = "uniform",
    standings: Standings = _NONE,
) -> tuple[str, ...]:
    """Select ``ceil(fraction * n)`` clients without replacement, at least one, sorted by name.

    >>> select_cohort(["a", "b", "c"], fraction=1.0, seed=0, round_number=1)
    ('a', 'b', 'c')

    Args:
        client_ids: who is there.
        fraction: in (0, 1].
        seed: of the run.
        round_number: 1-based.
        policy: one of `POLICIES`.
        standings: client id to what is known of it.
    """
    size = cohort_size(len(client_ids), fraction)
    order = order_clients(
        client_ids, size=size, seed=seed, round_number=round_number, policy=policy, standings=standings
    )
    return tuple(sorted(order[:size]))


def order_clients(
    client_ids: Collection[str],
    *,
    size: int,
    seed: int,
    round_number: int,
    policy: str = "uniform",
    standings: Standings = _NONE,
) -> list[str]:
    """All clients, in the order in which the round asks them.

    Args:
        client_ids: who is there.
        size: how many a round asks; ``round_robin`` moves on by that many from round to round.
        seed: of the run.
        round_number: 1-based.
        policy: one of `POLICIES`.
        standings: client id to what is known of it.
    """
    return POLICIES[policy](_Draw(tuple(set(client_ids)), size, seed, round_number, standings))


@dataclass(frozen=True)
class _Draw:
    """What a policy may look at."""

    client_ids: tuple[str, ...]
    size: int
    seed: int
    round_number: int
    standings: Standings

    def chance(self, client_id: str) -> bytes:
        return _hash(self.seed, self.round_number, client_id)

    def of(self, client_id: str) -> Standing:
        return self.standings.get(client_id, Standing())


def _hash(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()


def _uniform(draw: _Draw) -> list[str]:
    return sorted(draw.client_ids, key=draw.chance)


def _round_robin(draw: _Draw) -> list[str]:
    """Of n clients that stay, everybody is asked once in any ``ceil(n / size)`` rounds in a row."""
    fixed = sorted(draw.client_ids, key=lambda client_id: _hash(draw.seed, "turn", client_id))
    start = (draw.round_number - 1) * draw.size % max(1, len(fixed))
    return fixed[start:] + fixed[:start]


def _by_examples(draw: _Draw) -> list[str]:
    """A client whose count is not known yet counts as the mean of those that are there and known."""
    known = [draw.of(one).examples for one in draw.client_ids if draw.of(one).examples]
    mean = sum(known) / len(known) if known else 1.0
    return _weighted(draw, lambda client_id: draw.of(client_id).examples or mean)


def _availability(draw: _Draw) -> list[str]:
    return _weighted(draw, lambda client_id: draw.of(client_id).availability)


def _weighted(draw: _Draw, weight: Callable[[str], float]) -> list[str]:
    def key(client_id: str) -> tuple[float, bytes]:
        chance = draw.chance(client_id)
        uniform = (int.from_bytes(chance[:8]) >> 11) / 2**53  # in [0, 1)
        return -math.log1p(-uniform) / weight(client_id), chance

    return sorted(draw.client_ids, key=key)


POLICIES: Mapping[str, Callable[[_Draw], list[str]]] = MappingProxyType(
    {"uniform": _uniform, "by_examples": _by_examples, "round_robin": _round_robin, "availability": _availability}
)
"""Names that ``selection.policy`` may have."""
