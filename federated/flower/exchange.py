"""Talking to clients through a Flower Grid: push, then yield replies as they arrive, one update in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

__all__ = ["Forgetful", "Waiting", "abandon", "exchange", "pause", "push"]


@runtime_checkable
class Forgetful(Protocol):
    """A Grid that can drop messages which nobody waits for any more."""

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Drop the messages, or their replies."""
        ...


@runtime_checkable
class Waiting(Protocol):
    """A Grid whose `pull_messages` waits by itself for a moment when nothing is there: no need to sleep as well."""

    waits: bool


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    *,
    deadline: float,
    poll_interval: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Message]:
    """Push messages and yield the replies as they arrive, until all are in or the deadline has passed.

    A message that the Grid does not take (too large, node gone) is answered with Flower's error reply at once.

    Args:
        grid: any Flower Grid.
        messages: one per client.
        deadline: seconds; replies that come later are not waited for.
        poll_interval: seconds between looks when nothing was there.
        clock: seconds.
    """
    waiting, failed = push(grid, messages)
    yield from failed
    end = clock() + deadline
    while waiting:
        arrived = list(grid.pull_messages(waiting))
        for reply in arrived:
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        if clock() >= end:
            abandon(grid, waiting)
            return
        if not arrived and waiting:
            pause(grid, poll_interval)


def pause(grid: Grid, seconds: float) -> None:
    """Let time pass before the next look, unless the Grid did so itself."""
    if not isinstance(grid, Waiting):
        time.sleep(seconds)


def push(grid: Grid, messages: Iterable[Message]) -> tuple[set[str], list[Message]]:
    """Push messages: the ids of those that the Grid took, and Flower's error reply to each that it did not."""
    sent = list(messages)
    ids = list(grid.push_messages(sent))
    ids += [""] * (len(sent) - len(ids))  # Flower gives None, or an empty list, for what was not accepted
    failed = [
        Message(Error(ErrorCode.UNKNOWN, "the message was not delivered"), reply_to=message)
        for message, message_id in zip(sent, ids, strict=False)
        if not message_id
    ]
    return {message_id for message_id in ids if message_id}, failed


def abandon(grid: Grid, message_ids: Iterable[str]) -> None:
    """Tell an in-process Grid to forget messages, else late work would delay every later round; others cannot."""
    if isinstance(grid, Forgetful):
        grid.abandon(message_ids)
