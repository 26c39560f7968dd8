"""The parts of one server, and what keeps them going: queues, threads, and the follower of a channel."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from federated.device.records import Slot
from federated.device.serving.batching import Batcher, Share
from federated.device.serving.control import Control
from federated.device.serving.directory import Wanted
from federated.device.serving.health import Health, Unheard, judged
from federated.device.serving.limits import Limits
from federated.device.serving.metrics import Metrics
from federated.device.serving.threads import in_thread
from federated.device.serving.writing import Writer
from federated.device.slots import AdapterRuntime
from federated.errors import DeviceError, FederatedError

__all__ = ["Service", "Speaks", "State"]

_LOG = logging.getLogger("federated.serving")

Speaks = Literal["text", "labels"]


@dataclass
class State:
    """Whether the server answers.

    Args:
        ready: between its start and its stop.
    """

    ready: bool = False


class Service:
    """What both listeners share.

    Args:
        runtime: answers.
        control: changes which adapter does.
        speaks: ``"text"`` where the task is a language model's, ``"labels"`` where it classifies.
        limits: of sizes, counts and times.
        health: told how each slot does.
        poll_seconds: between two looks at the followed channel.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        runtime: AdapterRuntime,
        control: Control,
        *,
        speaks: Speaks,
        limits: Limits | None = None,
        health: Health | None = None,
        poll_seconds: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.runtime, self.control, self.speaks, self.clock = runtime, control, speaks, clock
        self.directory = control.directory
        self.limits = limits or Limits()
        self.metrics = Metrics(runtime, control)
        self.health = health or Unheard()
        self.state = State()
        self.started = int(clock())
        self._poll_seconds = poll_seconds
        self._pool = ThreadPoolExecutor(2 * self.limits.generations + 6, thread_name_prefix="serving")
        self.writer = Writer(runtime, self.limits, pool=self._pool, metrics=self.metrics, health=self.health)
        self._classify = self._batcher(self._predicted)
        self._embed = self._batcher(self._embedded)
        for name, waiting in (
            ("generate", lambda: self.writer.gate.waiting),
            ("classify", lambda: self._classify.waiting),
            ("embed", lambda: self._embed.waiting),
        ):
            self.metrics.watch(name, waiting)

    def _batcher(self, run: Callable[[Sequence[Share]], Sequence[Any]]) -> Batcher:
        return Batcher(run, self.limits, pool=self._pool, seen=self.metrics.batch)

    async def classify(self, rows: Sequence[Any], wanted: Wanted) -> tuple[Slot, Sequence[Any]]:
        """Predictions of one request, by the one slot that is returned with them."""
        return await self._shared(self._classify, rows, wanted)

    async def embed(self, texts: Sequence[str], wanted: Wanted) -> tuple[Slot, Sequence[Any]]:
        """Embeddings of one request, by the one slot that is returned with them."""
        return await self._shared(self._embed, texts, wanted)

    async def _shared(self, batcher: Batcher, rows: Sequence[Any], wanted: Wanted) -> tuple[Slot, Sequence[Any]]:
        with await in_thread(self._pool, lambda: self._pinned(wanted), undo=ExitStack.close) as stack:
            slot = stack.slot
            with judged(self.health, slot):
                made = await batcher.submit(Share(slot, rows))
            self.health.success(slot.digest)
            return slot, made

    def _pinned(self, wanted: Wanted) -> _Pin:
        pin = _Pin()
        pin.slot = pin.enter_context(self.runtime.pin(wanted.digest, route=wanted.route))
        return pin

    async def in_thread(self, call: Callable[[], Any]) -> Any:
        """Run one of the control's changes without holding the event loop up."""
        return await in_thread(self._pool, call)

    def _predicted(self, shares: Sequence[Share]) -> Sequence[Any]:
        pairs = [(row, share.slot.digest) for share in shares for row in share.rows]
        made = [answer.prediction for answer in self.runtime.predict_mixed(pairs)]
        if not all(math.isfinite(value) for one in made for value in one.scores.values()):
            raise DeviceError("an answer is not a finite number: the input's numbers are too large for this model")
        return made

    def _embedded(self, shares: Sequence[Share]) -> Sequence[Any]:
        made: dict[int, list[Any]] = {}
        by_slot = sorted(range(len(shares)), key=lambda at: shares[at].slot.digest)
        for digest, places in itertools.groupby(by_slot, key=lambda at: shares[at].slot.digest):
            group = list(places)
            texts = [text for at in group for text in shares[at].rows]
            vectors = list(self.runtime.embed(texts, digest=digest)[1])
            for at in group:
                made[at], vectors = vectors[: len(shares[at].rows)], vectors[len(shares[at].rows) :]
        return [vector for at in range(len(shares)) for vector in made[at]]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the queues going, and follow the channel, in the running event loop."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in (self._classify.work(), self._embed.work(), self._follow())]
            self.state.ready = True
            try:
                yield
            finally:
                self.state.ready = False
                for task in tasks:
                    task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _follow(self) -> None:
        while self.control.channel is not None:
            await asyncio.sleep(self._poll_seconds)
            try:
                made = await self.in_thread(lambda: self.control.follow(patient=True))
            except Exception as error:  # noqa: BLE001 - whatever a store raises, what is served goes on
                told = error if isinstance(error, FederatedError) else type(error).__name__
                _LOG.warning("the channel %s cannot be followed: %s", self.control.channel, told)
            else:
                if made is not None:
                    _LOG.info("%s: %s answers, before: %s", made.kind, made.digest[:12], made.previous[:12])


class _Pin(ExitStack):
    """A pinned slot."""

    slot: Slot
