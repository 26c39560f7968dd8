"""What whoever serves reports of the version that answers, and what it means for a version on probation.

    health = HealthReport()
    health.success(slot.digest)
    health.failure(slot.digest, "the model raised OutOfMemory")

Called from any thread of a server; read by `federated.device.agent`. Holds counts and one reason, never inputs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

from federated.device.agent_config import ProbationConfig

__all__ = ["HealthReport", "Tally", "Verdict", "judge"]

Verdict = Literal["waiting", "passed", "failed"]


@dataclass(frozen=True)
class Tally:
    """What was reported of one slot since it was watched.

    Args:
        successes, failures: requests.
        reason: of the last failure, in the server's words.
    """

    successes: int = 0
    failures: int = 0
    reason: str = ""


class HealthReport:
    """Counts the requests of one slot at a time: the one that is being watched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched = ""
        self._tally = Tally()

    def success(self, digest: str, count: int = 1) -> None:
        """Requests that a slot answered; those of other slots than the watched one are passed over."""
        with self._lock:
            if digest == self._watched:
                now = self._tally
                self._tally = Tally(now.successes + count, now.failures, now.reason)

    def failure(self, digest: str, reason: str) -> None:
        """A request that a slot should have answered and did not, or a health check that failed.

        Args:
            digest: of the slot.
            reason: what went wrong; without anything of the request's content.
        """
        with self._lock:
            if digest == self._watched:
                now = self._tally
                self._tally = Tally(now.successes, now.failures + 1, reason)

    def watch(self, digest: str) -> None:
        """Begin to count for a slot, from zero."""
        with self._lock:
            self._watched, self._tally = digest, Tally()

    @property
    def tally(self) -> Tally:
        """What was counted since `watch`."""
        return self._tally


def judge(tally: Tally, seconds: float, config: ProbationConfig) -> Verdict:
    """Whether a version on probation has passed, by its requests or by its time."""
    if tally.failures > config.failures:
        return "failed"
    return "passed" if tally.successes >= config.requests or seconds >= config.seconds else "waiting"
