"""A bounded number of places, a bounded queue before them, and a bounded wait in it. One event loop's."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from federated.device.serving.faults import busy

__all__ = ["Gate", "Pace"]

_RETRY_MOST = 60


class Pace:
    """How long work takes lately: what a refused request is told to wait."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def note(self, seconds: float) -> None:
        """Take in how long something took."""
        self._seconds += 0.2 * (seconds - self._seconds)

    def retry_after(self, ahead: float) -> int:
        """Whole seconds until so many pieces of work are done, 1 to 60."""
        return min(_RETRY_MOST, max(1, math.ceil(self._seconds * ahead)))


class Gate:
    """At most ``places`` at a time; more wait in the order of their arrival.

    Args:
        places: how many work at once.
        waiting: how many may wait.
        seconds: how long each may.
    """

    def __init__(self, places: int, *, waiting: int, seconds: float) -> None:
        self._free = asyncio.Semaphore(places)
        self._places, self._most, self._seconds = places, waiting, seconds
        self._pace = Pace()
        self.waiting = 0
        self.working = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place.

        Raises:
            ApiError: 429 if too many wait already, 503 if none came free in time.
        """
        await self._wait()
        begin = time.perf_counter()
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1
            self._pace.note(time.perf_counter() - begin)
            self._free.release()

    async def _wait(self) -> None:
        if self._free.locked() and self.waiting >= self._most:
            raise busy(f"{self.waiting} requests wait already, which is the most", status=429, retry_after=self._retry)
        self.waiting += 1
        try:
            async with asyncio.timeout(self._seconds):
                await self._free.acquire()
        except TimeoutError:
            raise busy(f"no place came free within {self._seconds:g} s", status=503, retry_after=self._retry) from None
        finally:
            self.waiting -= 1

    @property
    def _retry(self) -> int:
        return self._pace.retry_after((self.waiting + 1) / self._places)
