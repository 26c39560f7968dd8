"""A fixed division of the clients, and whose turn it is: nobody has to trust or to hide it.

    groups            b = round(1 / fraction)
    of a client       hash(seed, client id) mod b
    asked in round t  (t - 1) mod b

A client's group depends on its own name and the run's seed alone, so that adding or removing a client moves nobody
else: dealing out a shuffled list would give equal groups, and a neighbour of the population would have another division
altogether. So groups are only about equally large. All are divided by the same planned number, population / b: in the
sum of b rounds each client counts once, whichever group it is in.

The population is fixed with the first round and kept with the run, because the planned number is. A client that comes
later takes no part; one that is not there in its group's round is one that does not answer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Self

from federated.config import ClientPrivacyConfig
from federated.errors import PrivacyError
from federated.privacy.private_file import write_private

__all__ = ["FixedGroups", "group_count", "group_of", "groups_of", "too_few"]

_WITHOUT = "it says who is in the run's groups: put it back, or start a new run"


def group_count(fraction: float) -> int:
    """The whole number of groups that is nearest to ``1 / fraction``; the larger one of two.

    >>> [group_count(fraction) for fraction in (1.0, 0.4, 0.3, 0.1)]
    [1, 3, 3, 10]
    """
    return math.floor(1 / fraction + 0.5)


def groups_of(client: ClientPrivacyConfig, fraction: float) -> int:
    """Groups of which a round asks one; 1 where any client may be in any round.

    Args:
        client: of client-level privacy.
        fraction: ``selection.fraction``.
    """
    return group_count(fraction) if client.mechanism == "banded" else 1


def group_of(client_id: str, *, groups: int, seed: int) -> int:
    """The group of a client, from 0."""
    digest = hashlib.sha256(f"{seed}\0group\0{client_id}".encode()).digest()
    return int.from_bytes(digest) % groups


def too_few(population: int, *, groups: int) -> str:
    """Why so few clients cannot be divided like that; empty where they can."""
    if population >= groups:
        return ""
    return (
        f"privacy.client.mechanism = 'banded': {population} clients in {groups} groups would leave some empty, and the "
        f"rounds of those noise alone; use selection.fraction={1 / max(1, population):.3g} or above, or more clients"
    )


class FixedGroups:
    """The clients of a run, divided.

    Args:
        population: all clients that may ever be asked.
        groups: how many, at least 1.
        seed: of the run.

    Raises:
        PrivacyError: for fewer clients than groups.
    """

    def __init__(self, population: Collection[str], *, groups: int, seed: int) -> None:
        self.population = tuple(sorted(set(population)))
        why = too_few(len(self.population), groups=groups)
        if why:
            raise PrivacyError(why)
        self._groups = groups
        self._seed = seed

    @classmethod
    def of_run(cls, path: Path, population: Collection[str], *, groups: int, seed: int, fresh: bool) -> Self:
        """The division that the file keeps, or a new one of this population.

        Args:
            path: the file.
            population: who is there, for a new one.
            groups: how many.
            seed: of the run.
            fresh: whether no round was charged yet; else there must be a file.

        Raises:
            PrivacyError: if the file cannot be read or written, is missing or damaged, or is of another division.
        """
        try:
            if fresh and not path.exists():
                made = cls(population, groups=groups, seed=seed)
                kept = {"groups": groups, "seed": seed, "population": made.population}
                write_private(path, json.dumps(kept).encode())
                return made
            found = json.loads(path.read_bytes())
            names, division = [str(name) for name in found["population"]], (int(found["groups"]), int(found["seed"]))
        except OSError as error:
            raise PrivacyError(f"{path}: {error.strerror}; {_WITHOUT}") from None
        except (ValueError, KeyError, TypeError):
            raise PrivacyError(f"{path} is damaged; {_WITHOUT}") from None
        if division != (groups, seed):
            raise PrivacyError(
                f"{path}: this run's clients are in {division[0]} groups by seed {division[1]}, and the configuration "
                f"has {groups} by seed {seed}: somebody would be asked too often; start a new run"
            )
        return cls(names, groups=groups, seed=seed)

    def of_round(self, round_number: int) -> tuple[str, ...]:
        """The clients of the group whose turn it is, sorted by name; there may be none.

        Args:
            round_number: 1-based.
        """
        turn = (round_number - 1) % self._groups
        return tuple(one for one in self.population if group_of(one, groups=self._groups, seed=self._seed) == turn)
