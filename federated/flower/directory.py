"""Who is who: which client is at which node. Flower's node ids are only addresses; a client's own id is asked for."""

from __future__ import annotations

import time

from flwr.app import Message
from flwr.serverapp import Grid

from federated.config import ExperimentConfig
from federated.errors import NotEnoughUpdates, WireError
from federated.flower.exchange import exchange
from federated.flower.records import Reply, query_content
from federated.names import usable_client_id

__all__ = ["Directory"]

_LARGEST_PAUSE = 6
_PATIENCE = 5.0
"""Seconds that a round waits for the names of nodes that came late, when others are there already."""


class Directory:
    """Which client is at which node.

    Args:
        config: the experiment.
        least: clients without which no round of its rule can succeed.

    Attributes:
        nodes: client id to node id.
        ranks: client id to the largest rank that it says it trains; those that do not say are not in it.
        problems: nodes that gave no usable name, with the reason: ``(node id, text)``.
    """

    def __init__(self, config: ExperimentConfig, *, least: int = 1) -> None:
        self._config = config
        self._least = max(least, config.selection.min_clients)
        self._tries: dict[int, tuple[int, int]] = {}  # node: times asked, look at which it is asked again
        self._looks = 0
        self.nodes: dict[str, int] = {}
        self.ranks: dict[str, int] = {}
        self.problems: list[tuple[int, str]] = []

    def take_problems(self) -> list[tuple[int, str]]:
        """The problems since the last call."""
        found, self.problems = self.problems, []
        return found

    def wait(self, grid: Grid) -> None:
        """Ask until at least ``selection.min_clients`` clients are known, or as many as the rule needs.

        Raises:
            NotEnoughUpdates: if ``selection.wait`` seconds pass before.
        """
        selection = self._config.selection
        end = time.monotonic() + selection.wait
        self.refresh(grid)
        while len(self.nodes) < self._least:
            if time.monotonic() >= end:
                raise NotEnoughUpdates(self._too_few(self._least))
            time.sleep(self._config.round.poll_interval)
            self.refresh(grid)

    def _too_few(self, expected: int) -> str:
        causes = "; ".join(f"node {node}: {text}" for node, text in self.problems[:3])
        tail = f". {causes}" if causes else ""
        seconds = self._config.selection.wait
        why = " (the rule needs so many)" if expected > self._config.selection.min_clients else ""
        return f"{len(self.nodes)} clients answered within {seconds:g} s, expected {expected}{why}{tail}"

    def refresh(self, grid: Grid) -> None:
        """Drop nodes that are gone and ask those without a name for their client id.

        A node that was silent or gave no usable name is asked again, after ever more looks: a restarted client is
        let in once its old node is gone, and a dead one does not delay every round.
        """
        present = set(grid.get_node_ids())
        self.nodes = {client: node for client, node in self.nodes.items() if node in present}
        self._tries = {node: tries for node, tries in self._tries.items() if node in present}
        self._looks += 1
        unnamed = present - set(self.nodes.values())
        due = sorted(node for node in unnamed if self._looks >= self._tries.get(node, (0, 0))[1])
        if not due:
            return
        for node in due:
            tries = self._tries.get(node, (0, 0))[0] + 1
            self._tries[node] = (tries, self._looks + 2 ** min(tries, _LARGEST_PAUSE))
        queries = [Message(query_content(self._config), node, "query", group_id="0") for node in due]
        wait = self._config.selection.wait
        wait = min(wait, _PATIENCE) if self.nodes else wait
        for reply in exchange(grid, queries, deadline=wait, poll_interval=self._config.round.poll_interval):
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
        if reply.reason or not usable_client_id(reply.client_id):
            self.problems.append((node, reply.message or "it gave no client id that can be used"))
        elif reply.client_id in self.nodes:
            self.problems.append(
                (node, f"client id {reply.client_id!r} is taken by node {self.nodes[reply.client_id]}")
            )
        else:
            self.nodes[reply.client_id] = node
            if reply.rank is not None:
                self.ranks[reply.client_id] = reply.rank
