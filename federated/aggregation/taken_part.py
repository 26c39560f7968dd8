"""Who has taken part so far, in which round last, and with which weight: the memory of rules with control variates.

It is part of a rule's state, so it is saved with each version, and it changes only with a round that was applied: a
client's own memory counts from the round that the server's counts (`TrainPlan.memory_round`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from federated.delta import Update
from federated.state import RuleState

__all__ = ["TakenPart"]

_KEY = "clients"


class TakenPart:
    """A running record, made from a rule's state at the start of a round.

    Args:
        state: of the rule, before the round.
    """

    def __init__(self, state: RuleState) -> None:
        known: Mapping[str, Any] = state.scalars.get(_KEY, {})
        self._clients = {name: (int(entry[0]), float(entry[1])) for name, entry in known.items()}

    def last_round(self, client_id: str) -> int:
        """The round of the client's last update that was applied; 0 where there was none."""
        return self._clients.get(client_id, (0, 0.0))[0]

    def note(self, update: Update, weight: float) -> None:
        """This update is in the aggregate."""
        self._clients[update.client_id] = (update.round_number, weight)

    def total_weight(self, num_clients: int = 0) -> float:
        """The weights of all who have taken part, together.

        Args:
            num_clients: how many there are in all: who has not taken part yet counts with the mean of the others.
        """
        found = math.fsum(weight for _, weight in self._clients.values())
        return found * max(1.0, num_clients / len(self._clients)) if self._clients else 0.0

    def scalars(self) -> dict[str, Any]:
        """Plain data for `RuleState`."""
        return {_KEY: {name: list(self._clients[name]) for name in sorted(self._clients)}}
