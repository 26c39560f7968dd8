"""Talking to clients through a Flower Grid: push, poll, and know who is who.

`exchange` yields replies as they arrive, so that one update is in memory at a time. `Directory` asks each node once
for its client id; Flower's node ids are only addresses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from federated.config import ExperimentConfig
from federated.errors import NotEnoughUpdates, WireError
from federated.flower.records import Reply, query_content

__all__ = ["Directory", "Forgetful", "exchange"]

_LONGEST_ID = 200


@runtime_checkable
class Forgetful(Protocol):
    """A Grid that can drop messages which nobody waits for any more."""

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Drop the messages, or their replies."""
        ...


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    *,
    deadline: float,
    poll_interval: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Message]:
    """Push messages and yield the replies as they arrive, until all are in or the deadline has passed.

    Args:
        grid: any Flower Grid.
        messages: one per client.
        deadline: seconds; replies that come later are not waited for.
        poll_interval: seconds between looks when nothing was there.
        clock: seconds.
    """
    waiting = set(grid.push_messages(messages))
    end = clock() + deadline
    while waiting:
        arrived = list(grid.pull_messages(waiting))
        for reply in arrived:
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        if clock() >= end:
            _abandon(grid, waiting)
            return
        if not arrived and waiting:
            time.sleep(poll_interval)


def _abandon(grid: Grid, message_ids: set[str]) -> None:
    """Tell an in-process Grid to forget messages, else late work would delay every later round; others cannot."""
    if isinstance(grid, Forgetful):
        grid.abandon(message_ids)


def _usable(client_id: str) -> bool:
    """Cohorts, tokens and stores are keyed on it, and it is shown: printable and of bounded length."""
    return 0 < len(client_id) <= _LONGEST_ID and client_id.isprintable()


_PATIENCE = 5.0
"""Seconds that a round waits for the names of nodes that came late, when others are there already."""


class Directory:
    """Which client is at which node.

    Attributes:
        nodes: client id to node id.
        problems: nodes that gave no usable name, with the reason: ``(node id, text)``.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self._asked: set[int] = set()
        self.nodes: dict[str, int] = {}
        self.problems: list[tuple[int, str]] = []

    def take_problems(self) -> list[tuple[int, str]]:
        """The problems since the last call."""
        found, self.problems = self.problems, []
        return found

    def wait(self, grid: Grid) -> None:
        """Ask until at least ``selection.min_clients`` clients are known.

        Raises:
            NotEnoughUpdates: if ``selection.wait`` seconds pass before.
        """
        selection = self._config.selection
        end = time.monotonic() + selection.wait
        self.refresh(grid)
        while len(self.nodes) < selection.min_clients:
            if time.monotonic() >= end:
                raise NotEnoughUpdates(self._too_few(selection.min_clients))
            time.sleep(self._config.round.poll_interval)
            self.refresh(grid)

    def _too_few(self, expected: int) -> str:
        causes = "; ".join(f"node {node}: {text}" for node, text in self.problems[:3])
        tail = f". {causes}" if causes else ""
        seconds = self._config.selection.wait
        return f"{len(self.nodes)} clients answered within {seconds:g} s, expected {expected}{tail}"

    def refresh(self, grid: Grid) -> None:
        """Drop nodes that are gone and ask new ones for their client id."""
        present = set(grid.get_node_ids())
        self.nodes = {client: node for client, node in self.nodes.items() if node in present}
        self._asked &= present
        fresh = sorted(present - self._asked)
        if not fresh:
            return
        queries = [Message(query_content(self._config), node, "query", group_id="0") for node in fresh]
        wait = self._config.selection.wait
        wait = min(wait, _PATIENCE) if self.nodes else wait
        for reply in exchange(grid, queries, deadline=wait, poll_interval=self._config.round.poll_interval):
            self._asked.add(reply.metadata.src_node_id)
            self._enter(reply)

    def _enter(self, message: Message) -> None:
        node = message.metadata.src_node_id
        try:
            if message.has_error():
                raise WireError(str(message.error.reason)[:300])
            reply = Reply.from_message(message)
        except WireError as error:
            self.problems.append((node, str(error)))
            return
        if reply.reason or not _usable(reply.client_id):
            self.problems.append((node, reply.message or "it gave no client id that can be used"))
        elif reply.client_id in self.nodes:
            self.problems.append(
                (node, f"client id {reply.client_id!r} is taken by node {self.nodes[reply.client_id]}")
            )
        else:
            self.nodes[reply.client_id] = node
