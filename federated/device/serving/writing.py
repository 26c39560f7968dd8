"""One answer being written: its place among those at work, its pin, its deadline.

Tokens are computed in threads, each when it is asked for, so that a client who reads slowly costs no work ahead. Place
and pin are given back after the last token, an error, the deadline, or as soon as the token under way is done when the
client goes away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import AsyncExitStack

from federated.device.generation import Generation
from federated.device.records import Prompt, Sampling, Token
from federated.device.serving.directory import Wanted
from federated.device.serving.faults import ApiError
from federated.device.serving.gate import Gate
from federated.device.serving.health import Health, judged
from federated.device.serving.limits import Limits
from federated.device.serving.metrics import Metrics
from federated.device.serving.threads import in_thread
from federated.device.slots import AdapterRuntime

__all__ = ["Answer", "Writer"]


class Answer:
    """Tokens of one answer; `close` must be awaited at the end, and may be at any time.

    Args:
        generation: holds the pin.
        pool: where tokens are computed.
        deadline: of the event loop's clock.
        health: told if the slot fails.
        end: told of the answer when it is closed.

    Attributes:
        slot: which adapter answers.
    """

    def __init__(
        self,
        generation: Generation,
        pool: Executor,
        *,
        deadline: float,
        health: Health,
        end: Callable[[Generation], object],
    ) -> None:
        self.generation = generation
        self.slot = generation.slot
        self._pool, self._deadline, self._health, self._end = pool, deadline, health, end
        self._stack = AsyncExitStack()

    async def tokens(self) -> AsyncIterator[Token]:
        """The tokens as they come.

        Raises:
            ApiError: 504 at the deadline.
        """
        while (token := await self._next()) is not None:
            yield token

    async def _next(self) -> Token | None:
        try:
            async with asyncio.timeout_at(self._deadline):
                with judged(self._health, self.slot):
                    return await in_thread(self._pool, lambda: next(self.generation, None))
        except TimeoutError:
            raise ApiError(
                "the answer was not finished in time; ask for fewer tokens (max_tokens)", status=504, code="timeout"
            ) from None

    def keep(self, stack: AsyncExitStack) -> None:
        """Take over what `close` gives back."""
        self._stack = stack

    async def close(self) -> None:
        """Give pin and place back; waits for the token that is being computed. Again changes nothing."""
        await asyncio.shield(self._close())

    async def _close(self) -> None:
        async with self._stack.pop_all():
            await in_thread(self._pool, self.generation.close)
            self._end(self.generation)


class Writer:
    """Begins answers, a bounded number at a time.

    Args:
        runtime: answers.
        limits: how many at once, how many wait, how long.
        pool: with two threads for each answer at work: one computes, one may wait to close it.
        metrics: told of tokens.
        health: told how each slot does.
    """

    def __init__(
        self, runtime: AdapterRuntime, limits: Limits, *, pool: Executor, metrics: Metrics, health: Health
    ) -> None:
        self._runtime, self._limits, self._pool, self._metrics = runtime, limits, pool, metrics
        self._health = health
        self.gate = Gate(limits.generations, waiting=limits.waiting, seconds=limits.wait_seconds)

    async def begin(self, prompt: Prompt, sampling: Sampling, wanted: Wanted) -> Answer:
        """Wait for a place, pin the slot and begin.

        Raises:
            ApiError: if there is no place.
            DeviceError: if the prompt cannot be answered.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.gate.place())
            generation = await in_thread(
                self._pool,
                lambda: self._runtime.generate(prompt, sampling, digest=wanted.digest, route=wanted.route),
                undo=Generation.close,
            )
            deadline = asyncio.get_running_loop().time() + self._limits.request_seconds
            answer = Answer(generation, self._pool, deadline=deadline, health=self._health, end=self._ended)
            answer.keep(stack.pop_all())
        return answer

    def _ended(self, generation: Generation) -> None:
        if generation.finish_reason in ("stop", "length"):
            self._health.success(generation.slot.digest)
        self._metrics.tokens(prompt=generation.prompt_tokens, completion=generation.completion_tokens)
