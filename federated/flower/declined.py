"""What a client says that takes no part for the moment, since a condition of its owner does not hold: "not now"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from flwr.app import ConfigRecord, RecordDict

from federated.errors import NotNow

__all__ = ["NOT_NOW", "Declined", "not_now_content"]

NOT_NOW = "not_now"
"""The reason in such a reply, and the status of such a client in a round."""
_SOONEST, _LATEST, _USUAL = 1.0, 3600.0, 60.0


@dataclass(frozen=True)
class Declined:
    """What such a client says.

    Args:
        condition: name of what does not hold.
        seconds: after which it may be asked again.
    """

    condition: str
    seconds: float

    @classmethod
    def claimed(cls, condition: str, seconds: Any) -> Self:
        """From a reply: when to ask again is the client's claim, and taken within bounds."""
        known = float(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else _USUAL
        return cls(condition, min(max(known, _SOONEST), _LATEST))


def not_now_content(client_id: str, rank: int, error: NotNow) -> RecordDict:
    """A client's answer: who it is, which condition does not hold, and when to ask again.

    Privacy: nothing of what was measured.
    """
    head = ConfigRecord({"client_id": client_id, "task_token": "", "rank": rank, "reason": NOT_NOW})
    head["message"], head["condition"], head["ask_again"] = str(error), error.condition, error.seconds
    return RecordDict({"reply": head})
