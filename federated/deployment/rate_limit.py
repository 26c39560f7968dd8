"""How often one address may ask: a bucket of tokens for each, in memory, and a bound on how many are remembered.

It keeps one careless or hostile address from occupying the door. It is no defence of secrets (those are too long to be
guessed), nor against many addresses at once.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from federated.listening import network_of

__all__ = ["RateLimit"]


class RateLimit:
    """Buckets by address.

    Args:
        burst: requests that an address may make at once after a pause.
        per_second: requests that it may make in the long run.
        addresses: that are remembered; beyond, the one that was heard longest ago is forgotten, whose bucket is
            the fullest.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        *,
        burst: int = 40,
        per_second: float = 4.0,
        addresses: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst, self._rate, self._most, self._clock = burst, per_second, addresses, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address: tokens, when they were counted
        self._lock = threading.Lock()

    def wait(self, address: str) -> float:
        """Take a token, if there is one.

        Returns:
            0, or the seconds until there is one.
        """
        key, now = network_of(address), self._clock()
        with self._lock:
            tokens, counted = self._buckets.pop(key, (float(self._burst), now))
            tokens = min(self._burst, tokens + (now - counted) * self._rate)
            missing = max(0.0, 1.0 - tokens)
            self._buckets[key] = (tokens if missing else tokens - 1.0, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        return missing / self._rate
