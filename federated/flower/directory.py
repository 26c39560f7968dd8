"""Who is who: which client is at which node. Flower's node ids are only addresses; a client's own id is asked for.

Where devices are enrolled, `federated.flower.enrolled_nodes` says who may be whom, anew at each look.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from federated.config import ExperimentConfig
from federated.errors import NotEnoughUpdates, WireError
from federated.flower.declined import Declined
from federated.flower.enrolled_nodes import EnrolledNodes, Fault
from federated.flower.exchange import exchange
from federated.flower.records import Reply, query_content
from federated.flower.round_book import Outcome
from federated.names import usable_client_id

__all__ = ["Directory", "Problem", "Resting"]

_LOG = logging.getLogger(__name__)
_BY_SIGNATURE = (
    "admission.devices: simulated nodes have no keys, so the signature of its update alone says who a client is; what "
    "it measures is not signed"
)
_LARGEST_PAUSE = 6
_SHOWN = 5
_PATIENCE = 5.0
"""Seconds that a round waits for the names of nodes that came late, when others are there already."""


class Problem(NamedTuple):
    """A node that takes no part: its id, a code of `NODE_REASONS`, and what was found."""

    node: int
    reason: str
    text: str

    def as_event(self) -> dict[str, Any]:
        """The ``node_problem`` event of the run's metrics."""
        return {"event": "node_problem", "node_id": str(self.node), "reason": self.reason, "message": self.text}


@dataclass(frozen=True)
class Resting:
    """A client that is there and said "not now".

    Args:
        node: its node.
        condition: of its owner, that does not hold.
        until: when it is asked again, on the directory's clock.
    """

    node: int
    condition: str
    until: float


class Directory:
    """Which client is at which node.

    Args:
        config: the experiment.
        least: clients without which no round of its rule can succeed.
        tell: takes a ``node_problem`` event for each node that takes no part, a ``joined`` event with the
            digest of the pinned app for each client that comes, a ``not_now`` event for each client that
            says so, a ``waiting`` event when too few others are there, and a ``warning`` where names are bound by
            signatures alone.
        clock: seconds.

    Attributes:
        nodes: client id to node id, of those that may be asked.
        resting: client id to what is known of those that said "not now": they are in no cohort, and asked again later.
        ranks: client id to the largest rank that it says it trains; those that do not say are not in it.
        problems: nodes that take no part, and why, as found since the last `wait` began; one that stays out for the
            same reason is named once.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        least: int = 1,
        tell: Callable[[dict[str, Any]], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._tell = tell
        self._clock = clock
        self.resting: dict[str, Resting] = {}
        self._least = max(least, config.selection.min_clients)
        self._tries: dict[int, tuple[int, int]] = {}  # node: times asked, look at which it is asked again
        self._looks = 0
        self._enrolled = EnrolledNodes(config.admission.devices)
        self._told: dict[int, Fault] = {}
        self._warned = False
        self.nodes: dict[str, int] = {}
        self.ranks: dict[str, int] = {}
        self.problems: list[Problem] = []

    def allows(self, client_id: str) -> bool:
        """Whether a client may take part, as of the last look."""
        return self._enrolled.allows(client_id)

    def update_key(self, client_id: str) -> bytes | None:
        """What a client's updates must be signed with, as of the last look; None where it need not."""
        return self._enrolled.update_key(client_id)

    def gather(self, grid: Grid) -> None:
        """`wait`, and say where names are bound by signatures alone.

        Raises:
            NotEnoughUpdates: if too few clients come.
            ConfigError: if ``admission.devices`` cannot be read.
        """
        self.wait(grid)
        if self._enrolled.by_signature_alone and not self._warned:
            self._warned = True
            _LOG.warning("%s", _BY_SIGNATURE)
            self._tell({"event": "warning", "message": _BY_SIGNATURE})

    def heard(self, outcomes: Iterable[Outcome]) -> None:
        """Take note of the clients of a round that said "not now"."""
        for one in outcomes:
            if one.declined and one.client_id in self.nodes:
                self._rest(one.client_id, self.nodes.pop(one.client_id), one.declined)

    def wait(self, grid: Grid) -> None:
        """Ask until at least ``selection.min_clients`` clients may be asked, or as many as the rule needs.

        Raises:
            NotEnoughUpdates: if ``selection.wait`` seconds pass before.
        """
        selection = self._config.selection
        end = self._clock() + selection.wait
        self.problems = []
        self._look(grid)
        if len(self.nodes) < self._least and self.resting:
            message = f"{self._too_many_rest()}: waiting up to {selection.wait:g} s (selection.wait)"
            _LOG.warning("%s", message)
            self._tell({"event": "waiting", "message": message})
        while len(self.nodes) < self._least:
            if self._clock() >= end:
                raise NotEnoughUpdates(self._too_few(self._least))
            time.sleep(self._config.round.poll_interval)
            self._look(grid)

    def _look(self, grid: Grid) -> None:
        """`refresh`, and say at once who takes no part and why: waiting for too few may take long."""
        known = len(self.problems)
        self.refresh(grid)
        for problem in self.problems[known:]:
            _LOG.warning("node %s takes no part: %s: %s", problem.node, problem.reason, problem.text)
            self._tell(problem.as_event())

    def _too_few(self, expected: int) -> str:
        causes = "; ".join(f"node {problem.node}: {problem.text}" for problem in self.problems[:3])
        tail = f". {causes}" if causes else ""
        seconds = self._config.selection.wait
        why = " (the rule needs so many)" if expected > self._config.selection.min_clients else ""
        rest = f"; {self._too_many_rest()}" if self.resting else ""
        return f"{len(self.nodes)} clients answered within {seconds:g} s, expected {expected}{why}{rest}{tail}"

    def _too_many_rest(self) -> str:
        named = [f"{client} ({one.condition})" for client, one in sorted(self.resting.items())]
        more = ["..."] if len(named) > _SHOWN else []
        every = "all" if not self.nodes else len(named)
        return f"{every} clients that are there say not now: {', '.join(named[:_SHOWN] + more)}"

    def refresh(self, grid: Grid) -> None:
        """Drop nodes that are gone or no longer enrolled, and ask those without a name for their client id.

        A node that was silent or gave no usable name is asked again, after ever more looks: a restarted client is
        let in once its old node is gone, and a dead one does not delay every round. One that cannot be anybody who is
        enrolled is not asked. Who said "not now" is asked again when it said.

        Raises:
            ConfigError: if ``admission.devices`` cannot be read.
        """
        present, now = self._enrolled.look(grid), self._clock()
        self._forget(present)
        strangers = {node for node in present if self._stays_out(node, self._enrolled.stranger(node))}
        self._looks += 1
        asleep = {one.node for one in self.resting.values() if now < one.until}
        unnamed = present - set(self.nodes.values()) - strangers - asleep
        due = sorted(node for node in unnamed if self._looks >= self._tries.get(node, (0, 0))[1])
        self.resting = {client: one for client, one in self.resting.items() if one.node not in due}
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

    def _forget(self, present: set[int]) -> None:
        """What was known of nodes that are gone, and of clients that may not take part any more."""
        here = {client: node for client, node in self.nodes.items() if node in present}
        self.resting = {
            client: one
            for client, one in self.resting.items()
            if one.node in present and not self._stays_out(one.node, self._enrolled.fault(client, one.node))
        }
        self.nodes = {
            client: node
            for client, node in here.items()
            if not self._stays_out(node, self._enrolled.fault(client, node))
        }
        self._told = {node: fault for node, fault in self._told.items() if node in present}
        kept = set() if self._enrolled.changed else present  # who was just approved does not wait for its turn
        self._tries = {node: tries for node, tries in self._tries.items() if node in kept}

    def _stays_out(self, node: int, fault: Fault | None) -> bool:
        """Whether there is a fault; noted, unless it is known of that node."""
        if fault is not None and self._told.get(node) != fault:
            self._told[node] = fault
            self.problems.append(Problem(node, *fault))
        return fault is not None

    def _enter(self, message: Message) -> None:
        node = message.metadata.src_node_id
        try:
            if message.has_error():
                raise WireError(str(message.error.reason)[:300])
            reply = Reply.from_message(message)
        except WireError as error:
            self.problems.append(Problem(node, "no_name", str(error)))
            return
        client_id = reply.client_id
        if (reply.reason and not reply.declined) or not usable_client_id(client_id):
            self.problems.append(Problem(node, "no_name", reply.message or "it gave no client id that can be used"))
        elif self._stays_out(node, self._enrolled.fault(client_id, node)):
            return
        elif (other := self._node_of(client_id)) not in (None, node):
            self.problems.append(Problem(node, "name_taken", f"client id {client_id!r} is taken by node {other}"))
        else:
            self._tries.pop(node, None)
            self.resting.pop(client_id, None)
            if reply.declined:
                self._rest(client_id, node, reply.declined)
            else:
                self.nodes[client_id] = node
                self._tell({"event": "joined", "client_id": client_id, "node_id": str(node), "app": reply.app})
            if reply.rank is not None:
                self.ranks[client_id] = reply.rank

    def _node_of(self, client_id: str) -> int | None:
        resting = self.resting.get(client_id)
        return resting.node if resting else self.nodes.get(client_id)

    def _rest(self, client_id: str, node: int, declined: Declined) -> None:
        self.resting[client_id] = Resting(node, declined.condition, self._clock() + declined.seconds)
        event = {"event": "not_now", "client_id": client_id, "condition": declined.condition}
        self._tell({**event, "seconds": declined.seconds})
