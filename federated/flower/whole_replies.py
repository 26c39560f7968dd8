"""A reply that is not whole yet holds up nobody.

A SuperNode sends the head of a reply first and its parts after it. Once Flower's Grid has seen the head it waits for
the parts, until three minutes after the last of them and for two hours at most, and hands out nothing meanwhile: a
device that was killed while it sent, has a slow link, or means harm would hold up everybody's round far beyond its
deadline. Here such a reply is looked at again at each pull, the others are handed out, and the deadline ends the wait.

What this uses of Flower's internals is in this module alone; where it is not there, Flower's own wait is left as it is,
and said.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import Message
from flwr.serverapp import Grid

__all__ = ["whole_replies"]

_LOG = logging.getLogger(__name__)
_HTTP_GRID = "flwr.superlink.grid.http_grid"
_NEEDED = (
    "ConfirmMessageReceivedRequest",
    "HttpGrid",
    "ObjectPullError",
    "inflate_object_from_contents",
    "pull_objects",
)


def whole_replies(grid: Grid) -> Grid:
    """The same Grid, whose `pull_messages` waits for no reply's parts; a simulation's Grid, which has none, as it is.

    Args:
        grid: that a ServerApp was given.
    """
    module: Any = importlib.import_module(_HTTP_GRID)
    if not isinstance(grid, getattr(module, "HttpGrid", ())):
        return grid
    if missing := [name for name in _NEEDED if not hasattr(module, name)]:
        _LOG.warning("a reply that is sent in half may hold up a round for minutes: flwr has no %s", ", ".join(missing))
        return grid
    return cast("Grid", _WholeReplies(grid, module))


@dataclass
class _Half:
    """A reply whose head is there.

    Args:
        parts: ids of its objects; the last is the reply's own.
        pull: gives an object's bytes.
        error: what Flower answers for it, should it stay as it is.
        missing: which part was not there at the last look.
    """

    parts: list[str]
    pull: Callable[[str], bytes]
    error: Message | None = None
    missing: str = ""

    def contents(self, unavailable: type[Exception]) -> dict[str, bytes] | None:
        """All parts, or None while one is not there. Nothing is kept of it then: half updates would fill the memory.

        Raises:
            Exception: as Flower does when a part will never come.
        """
        found = dict[str, bytes]()
        for part in sorted(self.parts, key=lambda one: one != self.missing):
            try:
                found[part] = self.pull(part)
            except unavailable:
                self.missing = part
                return None
        return found


class _WholeReplies:
    """A Grid's stand-in: everything but `pull_messages` and `abandon` is the Grid's own."""

    def __init__(self, grid: Any, module: Any) -> None:
        self._grid = grid
        self._module = module
        self._unavailable = importlib.import_module(module.pull_objects.__module__).ObjectUnavailableError
        self._halves: dict[str, _Half] = {}
        self._seen: list[_Half] = []

    def __getattr__(self, name: str) -> Any:
        """The Grid's."""
        return getattr(self._grid, name)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to those messages that are there and whole."""
        wanted = set(message_ids)
        whole = [reply for key in wanted & self._halves.keys() if (reply := self._again(key)) is not None]
        left = wanted - self._halves.keys() - {reply.metadata.reply_to_message_id for reply in whole}
        if not left:
            return whole
        with self._not_waiting():
            replies = list(self._grid.pull_messages(left))
        return [*whole, *(reply for reply in replies if not self._is_half(reply))]

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Look no more at replies that nobody waits for."""
        for key in message_ids:
            self._halves.pop(key, None)

    @contextmanager
    def _not_waiting(self) -> Iterator[None]:
        before, self._seen = self._module.pull_objects, []
        self._module.pull_objects = self._look
        try:
            yield
        finally:
            self._module.pull_objects = before

    def _look(self, object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        """In the place of Flower's wait: one look at each part."""
        half = _Half(list(object_ids), pull_object_fn)
        found = half.contents(self._unavailable)
        if found is None:
            self._seen.append(half)
            raise self._module.ObjectPullError(half.parts[-1], "it is not there yet")
        return found

    def _is_half(self, reply: Message) -> bool:
        """Whether Flower made this answer of what `_look` raised; the half is kept then."""
        if not reply.has_error() or reply.metadata.src_node_id != self._grid.node.node_id:
            return False
        for half in self._seen:
            if half.error is None and half.parts[-1] in (reply.error.reason or ""):
                half.error = reply
                self._halves[reply.metadata.reply_to_message_id] = half
                return True
        return False

    def _again(self, key: str) -> Message | None:
        """Look once more: the reply, Flower's answer for one that will never be whole, or None."""
        half = self._halves[key]
        try:
            found = half.contents(self._unavailable)
        except self._module.ObjectPullError:
            del self._halves[key]
            return half.error
        if found is None:
            return None
        del self._halves[key]
        name = half.parts[-1]
        self._grid._runtime_client.ConfirmMessageReceived(
            self._module.ConfirmMessageReceivedRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=name
            )
        )
        reply = cast("Message", self._module.inflate_object_from_contents(name, found))
        reply.metadata.__dict__["_message_id"] = name
        return reply
