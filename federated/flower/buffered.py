"""Buffered rounds (FedBuff): a version for every K good updates, whoever sends them and whenever they started.

A round is one buffer (`federated.flower.buffer`). When it is full, the rule and the server optimizer make the next
version of it. A client that becomes free is sent the newest version; at most ``round.concurrency`` clients train at
once, and nobody is waited for. A client has one turn in a round, so that a fast one does not fill a buffer alone: after
it the client waits for the next version. When all that are there have had their turn, the buffer is closed as it is.

What a reply must say is checked against what that very client was sent. Order of arrival decides who shares a buffer,
so runs differ unless it is fixed; within a buffer it leaves no trace.

Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022 (arXiv:2106.06639),
algorithm 1; its staleness weight has a = 1/2. Where we differ: updates may weigh by their examples (the paper divides
by K, which is the same when all weigh 1), and the one turn of a client.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from flwr.app import Message, MetricRecord
from flwr.serverapp import Grid

from federated.aggregation import Rule, basis_of
from federated.config import ExperimentConfig
from federated.flower.buffer import Buffer, Task
from federated.flower.directory import Directory
from federated.flower.exchange import abandon, pause, push
from federated.flower.messages import TaskWriter
from federated.flower.records import metric_record
from federated.flower.round_book import Outcome
from federated.flower.round_closer import RoundCloser
from federated.flower.selection import order_clients
from federated.flower.server_state import ServerState
from federated.tracking import Tracker

__all__ = ["BufferedRounds", "name_lost"]

_LOG = logging.getLogger(__name__)


def name_lost(server: ServerState, tracker: Tracker) -> None:
    """Say whose work a resumed run goes on without: those who were in training when its last version was made."""
    clients, server.at_work = server.at_work, ()
    if clients:
        why = "the run was stopped while they trained, and goes on from its last version"
        _name_dropped(tracker, clients, round_number=server.finished, why=why)


def _name_dropped(
    tracker: Tracker, clients: tuple[str, ...], *, round_number: int, why: str, level: int = logging.WARNING
) -> None:
    _LOG.log(level, "after round %d: dropped the work of %s: %s", round_number, ", ".join(clients), why)
    tracker.emit({"event": "dropped", "round_number": round_number, "clients": list(clients), "message": why})


class BufferedRounds:
    """Fills buffers and lets each become a version. Leaving the context drops, by name, what is still in training.

    Args:
        grid: any Flower Grid.
        config: its ``round``, ``selection``, ``strategy.weighted`` and ``seed`` steer this class.
        rule: combines a buffer.
        server: what clients are sent; moves when a round is closed.
        writer: writes messages and what their answers must say.
        directory: who is there.
        closer: ends rounds.
        tracker: takes the run's events.
        clock: seconds.
    """

    def __init__(
        self,
        grid: Grid,
        config: ExperimentConfig,
        *,
        rule: Rule,
        server: ServerState,
        writer: TaskWriter,
        directory: Directory,
        closer: RoundCloser,
        tracker: Tracker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid = grid
        self._config = config
        self._rule = rule
        self._server = server
        self._writer = writer
        self._directory = directory
        self._closer = closer
        self._tracker = tracker
        self._clock = clock
        self._tasks: dict[str, Task] = {}
        self._inbox: deque[Message] = deque()
        self._published = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            why = "the run ended while they trained"
            level = logging.INFO if error is None else logging.WARNING  # the last version is made while others train
            _name_dropped(self._tracker, self.at_work, round_number=self._server.finished, why=why, level=level)
            abandon(self._grid, set(self._tasks))

    @property
    def at_work(self) -> tuple[str, ...]:
        """Who is in training, by name."""
        return tuple(sorted(task.client_id for task in self._tasks.values()))

    def run(self, number: int) -> MetricRecord | None:
        """Fill one buffer and close its round.

        Args:
            number: of the round, 1-based; the directory must know who is there.

        Returns:
            Training metrics; None when there is no new version.

        Raises:
            RegistryError: if the version cannot be stored.
        """
        self._drop_revoked(number)
        opened, state = self._clock(), self._server.global_state
        buffer = Buffer(
            number,
            self._config.round,
            self._rule.start(state, 1),
            version=self._published,
            basis=basis_of(self._rule, state),
            weighted=self._config.strategy.weighted,
        )
        self._fill(buffer, self._order(number))
        self._server.at_work = self.at_work
        seconds = self._clock() - opened
        metrics = self._closer.close(
            buffer.result(), buffer.closed, number=number, seconds=seconds, measured=buffer.measured
        )
        self._published += metrics is not None
        return None if metrics is None else metric_record(metrics)

    def _drop_revoked(self, number: int) -> None:
        """Wait no longer for those whose enrolment ended while they trained."""
        gone = {key: task.client_id for key, task in self._tasks.items() if not self._directory.allows(task.client_id)}
        if gone:
            self._tasks = {key: task for key, task in self._tasks.items() if key not in gone}
            abandon(self._grid, gone)
            clients = tuple(sorted(gone.values()))
            _name_dropped(self._tracker, clients, round_number=number - 1, why="their devices are no longer enrolled")

    def _order(self, number: int) -> list[str]:
        return order_clients(
            list(self._directory.nodes),
            size=self._config.round.buffer,
            seed=self._config.seed,
            round_number=number,
            policy=self._config.selection.policy,
            standings=self._server.standings,
        )

    def _fill(self, buffer: Buffer, order: list[str]) -> None:
        """Hand out and take in until the buffer is full, or nobody is left to wait for."""
        self._announce(buffer, order)
        while not buffer.is_full:
            self._hand_out(buffer, order)
            if self._inbox:
                self._receive(buffer, self._inbox.popleft())
            elif self._tasks:
                self._look(buffer)
            else:
                return

    def _announce(self, buffer: Buffer, order: list[str]) -> None:
        free = max(0, self._config.round.concurrency - len(self._tasks))
        cohort = sorted({*self.at_work, *self._ready(buffer, order)[:free]})
        event = {"event": "round_start", "round_number": buffer.number, "cohort": cohort}
        self._tracker.emit({**event, "buffer": self._config.round.buffer, "version_id": self._server.version_id})

    def _ready(self, buffer: Buffer, order: list[str]) -> list[str]:
        """Who may be sent the newest version: neither in training nor had its turn."""
        busy = {*self.at_work, *buffer.outcomes}
        return [client_id for client_id in order if client_id not in busy]

    def _hand_out(self, buffer: Buffer, order: list[str]) -> None:
        if len(self._tasks) < self._config.round.concurrency:
            for client_id in self._ready(buffer, order):
                self._send(buffer, client_id)
                if len(self._tasks) >= self._config.round.concurrency:
                    return

    def _send(self, buffer: Buffer, client_id: str) -> None:
        messages, book = self._writer.write(
            self._server.global_state,
            {client_id: self._directory.nodes[client_id]},
            round_number=buffer.number,
            mode="train",
            version_id=self._server.version_id or "",
            counters=self._server.counters,
            ranks=self._directory.ranks,
            heads=self._server.ledger_heads,
        )
        end = self._clock() + self._config.round.deadline
        task = Task(client_id, book, version=self._published, basis=buffer.basis, end=end)
        ids, failed = push(self._grid, messages)
        self._tasks |= dict.fromkeys(ids, task)
        for reply in failed:
            self._settled(buffer, task, buffer.receive(task, reply))

    def _receive(self, buffer: Buffer, message: Message) -> None:
        task = self._tasks.pop(message.metadata.reply_to_message_id, None)
        if task is None:
            _LOG.warning("round %d: dropped a reply that nobody waits for, or a second one", buffer.number)
            return
        self._settled(buffer, task, buffer.receive(task, message))

    def _look(self, buffer: Buffer) -> None:
        """Fetch what has arrived; a client that is late is free again."""
        self._inbox.extend(self._grid.pull_messages(set(self._tasks)))
        here = {message.metadata.reply_to_message_id for message in self._inbox}
        now = self._clock()
        late = [key for key, task in self._tasks.items() if key not in here and now >= task.end]
        abandon(self._grid, late)
        for task in [self._tasks.pop(key) for key in late]:
            self._settled(buffer, task, buffer.settle(task))
        if not here and not late:
            pause(self._grid, self._config.round.poll_interval)

    def _settled(self, buffer: Buffer, task: Task, outcome: Outcome) -> None:
        self._directory.heard([outcome])
        if outcome.status == "ok":
            self._server.counters[task.client_id] = outcome.counter
        self._tracker.emit({**outcome.as_event(buffer.number), "staleness": buffer.staleness_of(task)})
