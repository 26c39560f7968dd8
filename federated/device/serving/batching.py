"""Requests that arrive while a batch runs share the next one: no timer, and no wait when there is nothing to share.

A request is never split, so that one slot answers all of it. Where a batch fails, each of its requests is tried alone:
a bad row fails its own request and no other.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from federated.device.records import Slot
from federated.device.serving.faults import ApiError, busy
from federated.device.serving.gate import Pace
from federated.device.serving.limits import Limits
from federated.device.serving.threads import in_thread

__all__ = ["Batcher", "Share"]


@dataclass(frozen=True)
class Share:
    """One request's part of a batch: its rows, all for one slot, which its own pin holds."""

    slot: Slot
    rows: Sequence[Any]


@dataclass(frozen=True, eq=False)
class _Job:
    share: Share
    answer: asyncio.Future[Sequence[Any]]
    begun: asyncio.Event


class Batcher:
    """A queue, and the one task that empties it batch by batch; one event loop's.

    Args:
        run: answers the rows of all shares, in order; called in a thread of ``pool``, by one thread at a time.
        limits: rows in a batch, requests that may wait, for how long, and how long their work may take.
        pool: where ``run`` runs.
        seen: told the number of rows of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Share]], Sequence[Any]],
        limits: Limits,
        *,
        pool: Executor,
        seen: Callable[[int], object],
    ) -> None:
        self._run, self._limits, self._pool, self._seen = run, limits, pool, seen
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._pace = Pace()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._jobs)

    async def submit(self, share: Share) -> Sequence[Any]:
        """Answers of one request's rows, in order.

        Raises:
            ApiError: 429 if too many wait already, 503 if its work did not begin in time, 504 if it did not end.
            Exception: what ``run`` raised for this share alone.
        """
        if len(self._jobs) >= self._limits.waiting:
            raise busy(f"{self.waiting} requests wait already, which is the most", status=429, retry_after=self._retry)
        job = _Job(share, asyncio.get_running_loop().create_future(), asyncio.Event())
        self._jobs.append(job)
        self._arrived.set()
        try:
            return await self._outcome(job)
        finally:
            job.answer.cancel()  # nobody waits any more, if it is not there
            if job in self._jobs:
                self._jobs.remove(job)

    async def _outcome(self, job: _Job) -> Sequence[Any]:
        wait, work = self._limits.wait_seconds, self._limits.request_seconds
        try:
            async with asyncio.timeout(wait):
                await job.begun.wait()
        except TimeoutError:
            raise busy(f"no work on it began within {wait:g} s", status=503, retry_after=self._retry) from None
        try:
            async with asyncio.timeout(work) as clock:
                return await job.answer
        except TimeoutError:
            if not clock.expired():
                raise
            raise ApiError(
                f"the answer was not ready within {work:g} s; send fewer inputs", status=504, code="timeout"
            ) from None

    async def work(self) -> None:
        """Empty the queue until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._jobs:
                await self._answer(self._next())

    def _next(self) -> list[_Job]:
        """The oldest jobs, as many as fit; always one."""
        taken = [self._jobs.popleft()]
        rows = len(taken[0].share.rows)
        while self._jobs and rows + len(self._jobs[0].share.rows) <= self._limits.batch_rows:
            taken.append(self._jobs.popleft())
            rows += len(taken[-1].share.rows)
        return taken

    async def _answer(self, jobs: Sequence[_Job]) -> None:
        begin = time.perf_counter()
        try:
            await self._together(jobs)
        except Exception as error:  # noqa: BLE001 - whatever a model raises belongs to the requests, not to this task
            if len(jobs) == 1:
                _fail(jobs[0], error)
            else:
                for job in jobs:
                    await self._answer([job])
        self._pace.note((time.perf_counter() - begin) / len(jobs))

    async def _together(self, jobs: Sequence[_Job]) -> None:
        awaited = [job for job in jobs if not job.answer.done()]  # the others' clients went away
        if not awaited:
            return
        for job in awaited:
            job.begun.set()
        shares = [job.share for job in awaited]
        made = list(await in_thread(self._pool, lambda: self._run(shares)))
        self._seen(len(made))
        for job in awaited:
            count = len(job.share.rows)
            mine, made = made[:count], made[count:]
            if not job.answer.done():
                job.answer.set_result(mine)

    @property
    def _retry(self) -> int:
        return self._pace.retry_after(self.waiting + 1)


def _fail(job: _Job, error: Exception) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)
