"""An answer under way: tokens one after another, and the pin that they all come from. No torch.

Made by `federated.device.slots.AdapterRuntime.generate`; how tokens are made is the backend's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal, Self

from federated.device.records import Slot, Stream, Token

__all__ = ["Generation"]


class Generation(Iterator[Token]):
    """Iterates over an answer's tokens; its slot stays pinned until the last one, an error or `close`.

    Nothing is computed but when the next token is asked for. Iterate from one thread at a time; `close` may come
    from any thread: it waits for the token that is being made.

    Args:
        slot: pinned already.
        stream: the backend's.
        release: takes the pin off the slot of a name.
        abandon: notes that the pin may be taken off; called without `close` when the object is dropped, in whatever
            thread and under whatever lock that happens. One of both is called, once.

    Attributes:
        slot: which adapter answers, whatever is activated meanwhile.
        prompt_tokens: how many tokens the prompt is.
        completion_tokens: how many were made so far.
        finish_reason: ``"stop"``, ``"length"``, or ``"cancelled"`` when it was closed before; None under way.
    """

    def __init__(
        self, slot: Slot, stream: Stream, release: Callable[[str], None], abandon: Callable[[str], None]
    ) -> None:
        self.slot = slot
        self.prompt_tokens = stream.prompt_tokens
        self.completion_tokens = 0
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self._tokens: Iterator[Token] | None = stream.tokens
        self._release, self._abandon = release, abandon
        self._lock = threading.Lock()

    def __next__(self) -> Token:
        with self._lock:
            if self._tokens is None:
                raise StopIteration
            try:
                token = next(self._tokens)
            except BaseException:
                self._end("cancelled")
                raise
            self.completion_tokens += 1
            if token.finish_reason is not None:
                self._end(token.finish_reason)
            return token

    def close(self) -> None:
        """Give the pin and the keys and values back, at whatever token; again changes nothing."""
        with self._lock:
            if self._tokens is not None:
                self._end("cancelled")

    def _end(self, reason: Literal["stop", "length", "cancelled"]) -> None:
        self.finish_reason, self._tokens = reason, None
        self._release(self.slot.digest)

    def text(self) -> str:
        """The rest of the answer at once."""
        return "".join(token.text for token in self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._tokens is not None:
            self._abandon(self.slot.digest)
