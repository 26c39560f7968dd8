"""A reply that is not whole yet holds up nobody.

A SuperNode sends the head of a reply first and its parts after it. Once Flower's Grid has seen the head it waits for
the parts, until three minutes after the last of them and for two hours at most, and hands out nothing meanwhile: a
device that was killed while it sent, has a slow link, or means harm would hold up everybody's round far beyond its
deadline. Here such a reply is looked at again at each pull, the others are handed out, and the deadline ends the wait.
Parts that do not make a message are that device's failure, and not the run's end.

What this uses of Flower's internals is in this module alone; where it is not there, Flower's own wait is left as it is,
and said.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from flwr.app import Message
from flwr.serverapp import Grid

__all__ = ["whole_replies"]

_LOG = logging.getLogger(__name__)
_HTTP_GRID = "flwr.superlink.grid.http_grid"
_INFLATABLE = "flwr.supercore.inflatable.inflatable_utils"
_NEEDED = (
    "ConfirmMessageReceivedRequest",
    "Error",
    "ErrorCode",
    "HttpGrid",
    "ObjectPullError",
    "inflate_object_from_contents",
    "make_message",
    "pull_objects",
)
_OF_THE_GRID = ("_runtime_client", "node", "run")
_MOST_PARTS = 1000
"""A reply of ours has a dozen; each part is a request."""


def whole_replies(grid: Grid) -> Grid:
    """The same Grid, whose `pull_messages` waits for no reply's parts; a simulation's Grid, which has none, as it is.

    Args:
        grid: that a ServerApp was given.
    """
    try:
        module: Any = importlib.import_module(_HTTP_GRID)
        unavailable: Any = importlib.import_module(_INFLATABLE).ObjectUnavailableError
    except (ImportError, AttributeError) as error:
        return _as_it_is(grid, str(error)) if type(grid).__name__ == "HttpGrid" else grid
    if not isinstance(grid, getattr(module, "HttpGrid", ())):
        return grid
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    missing += [name for name in _OF_THE_GRID if name not in vars(grid) and not hasattr(type(grid), name)]
    if missing:
        return _as_it_is(grid, f"no {', '.join(missing)}")
    return cast("Grid", _WholeReplies(grid, module, unavailable))


def _as_it_is(grid: Grid, why: str) -> Grid:
    _LOG.warning("a reply that is sent in half may hold up a round for minutes, with this flwr: %s", why)
    return grid


class _Half:
    """A reply whose head is there.

    Args:
        parts: ids of its objects; the last is the reply's own.
        pull: gives an object's bytes.
    """

    def __init__(self, parts: Iterable[str], pull: Callable[[str], bytes]) -> None:
        self.parts = list(dict.fromkeys(parts))
        self._pull = pull
        self._left = self.parts

    @property
    def name(self) -> str:
        """The reply's own id."""
        return self.parts[-1]

    def contents(self, unavailable: type[Exception]) -> dict[str, bytes] | None:
        """All parts, or None while one is not there. Nothing is kept of it then: half updates would fill the memory.

        Raises:
            Exception: as Flower does when a part will never come.
        """
        found = dict[str, bytes]()
        for number, part in enumerate(self._left):
            try:
                found[part] = self._pull(part)
            except unavailable:
                self._left = self._left[number:]
                return None
        return found | {part: self._pull(part) for part in self.parts if part not in found}


class _WholeReplies:
    """A Grid's stand-in: everything but `pull_messages` and `abandon` is the Grid's own."""

    def __init__(self, grid: Any, module: Any, unavailable: type[Exception]) -> None:
        self._grid = grid
        self._module = module
        self._unavailable = unavailable
        self._halves: dict[str, _Half] = {}
        self._errors: dict[str, Message] = {}  # Flower's answer to what `_note` raised, for each half
        self._seen: list[_Half] = []

    def __getattr__(self, name: str) -> Any:
        """The Grid's."""
        return getattr(self._grid, name)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to those messages that are there and whole."""
        wanted = set(message_ids)
        replies: list[Message] = []
        if left := wanted - self._halves.keys():
            with self._not_waiting():
                replies = [one for one in self._grid.pull_messages(left) if not self._is_half(one)]
        whole = (self._look(key) for key in sorted(wanted & self._halves.keys()))
        return [*replies, *(one for one in whole if one is not None)]

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Look no more at replies that nobody waits for."""
        for key in message_ids:
            self._forget(key)

    @contextmanager
    def _not_waiting(self) -> Iterator[None]:
        before, self._seen = self._module.pull_objects, []
        self._module.pull_objects = self._note
        try:
            yield
        finally:
            self._module.pull_objects = before

    def _note(self, object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        """In the place of Flower's wait, which would make an error of this exception: the reply is looked at here."""
        half = _Half(object_ids, pull_object_fn)
        self._seen.append(half)
        raise self._module.ObjectPullError(half.name, "it is looked at later")

    def _is_half(self, reply: Message) -> bool:
        """Whether Flower made this answer of what `_note` raised; the half is kept then."""
        if not reply.has_error() or reply.metadata.src_node_id != self._grid.node.node_id:
            return False
        for half in self._seen:
            if half.name in (reply.error.reason or ""):
                key = reply.metadata.reply_to_message_id
                self._seen.remove(half)
                self._halves[key], self._errors[key] = half, reply
                return True
        return False

    def _forget(self, key: str) -> None:
        self._halves.pop(key, None)
        self._errors.pop(key, None)

    def _look(self, key: str) -> Message | None:
        """The reply, an error for one that will never be whole, or None."""
        half = self._halves[key]
        try:
            if len(half.parts) > _MOST_PARTS:
                return self._given_up(key, f"it has {len(half.parts)} parts, expected at most {_MOST_PARTS}")
            found = half.contents(self._unavailable)
        except self._module.ObjectPullError as error:
            return self._given_up(key, str(error))
        if found is None:
            return None
        self._grid._runtime_client.ConfirmMessageReceived(
            self._module.ConfirmMessageReceivedRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=half.name
            )
        )
        try:
            reply = cast("Message", self._module.inflate_object_from_contents(half.name, found))
            reply.metadata.__dict__["_message_id"] = half.name
        except Exception as error:  # noqa: BLE001 - whatever a device's bytes lead to is that device's fault alone
            return self._given_up(key, f"its parts do not make a message: {error!r}")
        self._forget(key)
        return reply

    def _given_up(self, key: str, why: str) -> Message:
        """Flower's error for it, with the reason."""
        metadata = self._errors[key].metadata
        self._forget(key)
        error = self._module.Error(self._module.ErrorCode.MESSAGE_UNAVAILABLE, f"no whole reply: {why}"[:500])
        return cast("Message", self._module.make_message(metadata=metadata, error=error))
