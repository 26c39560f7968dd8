"""Blocking work from an event loop, without losing what it made when nobody waits any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

from starlette.requests import Request

__all__ = ["ClientGone", "in_thread", "while_connected"]

_Made = TypeVar("_Made")


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


async def in_thread(
    pool: Executor, call: Callable[[], _Made], *, undo: Callable[[_Made], object] | None = None
) -> _Made:
    """Run something in a thread of a pool.

    Args:
        pool: whose thread.
        call: what to run.
        undo: takes what ``call`` made after all, if the waiting task was cancelled meanwhile: runs in the event loop.
    """
    begun = pool.submit(call)
    made = asyncio.wrap_future(begun)
    try:
        return await asyncio.shield(made)
    except asyncio.CancelledError:
        if not begun.cancel():  # it runs, or is done
            made.add_done_callback(lambda done: _undone(done, undo))
        raise


def _undone(done: asyncio.Future[_Made], undo: Callable[[_Made], object] | None) -> None:
    if not done.cancelled() and done.exception() is None and undo is not None:
        undo(done.result())


async def while_connected(request: Request, work: Awaitable[_Made]) -> _Made:
    """Await something; cancel it when the client goes away.

    Args:
        request: its body was read already.
        work: what the client waits for.

    Raises:
        ClientGone: if the client went away first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
