"""A Flower Grid without servers: ClientApps answer in this process or in forked workers that share the base model.

Unchanged ServerApps and ClientApps run on it. Memory does not grow with the number of clients: messages wait as
they are, one client is at work per worker, and forked workers share what was loaded before the fork. It is for
simulation: nothing is encrypted, and a message does not pass through Flower's serialisation unless a worker gets it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from federated.errors import ConfigError

__all__ = ["InProcessGrid"]

_LOG = logging.getLogger(__name__)
_RUN_ID = 1
_WAIT = 0.05  # seconds that a pull waits for the first reply
_ALIVE = 1.0  # seconds between a waiting worker's looks at its parent
_FORKING = threading.Lock()  # two at once would hold each other's pipes open


@dataclass
class _Job:
    message: Message
    state: RecordDict


def _answer(client_app: ClientApp, job: _Job, num_nodes: int) -> tuple[Message, RecordDict]:
    """Let one ClientApp answer one message; an exception becomes Flower's error reply."""
    node_id = job.message.metadata.dst_node_id
    node_config: dict[str, Any] = {"partition-id": node_id - 1, "num-partitions": num_nodes}
    context = Context(run_id=_RUN_ID, node_id=node_id, node_config=node_config, state=job.state, run_config={})
    try:
        reply = client_app(job.message, context)
        if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != job.message.metadata.message_id:
            raise TypeError(f"the ClientApp returned a {type(reply).__name__} that is no reply to its message")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as on a SuperNode: an error reply
        _LOG.debug("ClientApp raised\n%s", traceback.format_exc())
        failure = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=f"{type(error).__name__}: {error}")
        reply = Message(failure, reply_to=job.message)
    return reply, context.state


def _work(near: Connection, far: Connection, client_app: ClientApp, num_nodes: int) -> None:
    """A forked worker: answer jobs until the parent is gone. The parent alone reacts to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    near.close()
    parent = os.getppid()
    while True:
        # Workers forked later hold copies of this pipe's other end, so a killed parent does not close it: look.
        while not far.poll(_ALIVE):
            if os.getppid() != parent:
                return
        try:
            far.send(_answer(client_app, far.recv(), num_nodes))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


class _Worker:
    """One forked process and the thread that feeds it."""

    def __init__(self, grid: InProcessGrid) -> None:
        self._grid = grid
        self._start()
        self._thread = threading.Thread(target=self._feed, daemon=True)

    def start_feeding(self) -> None:
        """Start the thread, after all processes were forked."""
        self._thread.start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        with _FORKING:
            self._connection, far = context.Pipe()
            arguments = (self._connection, far, self._grid.client_app, self._grid.num_nodes)
            self._process = context.Process(target=_work, args=arguments, daemon=True)
            self._process.start()
            far.close()

    def _feed(self) -> None:
        while (job := self._grid.next_job()) is not None:
            try:
                self._connection.send(job)
                reply, state = self._connection.recv()
            except (EOFError, OSError):
                if self._grid.closed:
                    return
                reply, state = self._died(job), job.state
            self._grid.deliver(job, reply, state)

    def _died(self, job: _Job) -> Message:
        self._process.join()
        reason = f"the worker process ended with exit code {self._process.exitcode}"
        self._connection.close()
        self._start()
        return Message(Error(code=ErrorCode.UNKNOWN, reason=reason), reply_to=job.message)

    def stop(self) -> None:
        """End the process, whatever it is doing, and one that just took the place of a dead one."""
        self._process.kill()
        self._thread.join(timeout=5)
        self._process.kill()
        self._process.join()
        self._connection.close()


@dataclass
class _Mail:
    """Messages on their way."""

    waiting: deque[_Job] = field(default_factory=deque)
    replies: dict[str, Message] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)


class InProcessGrid(Grid):
    """Runs a ClientApp for each of ``num_nodes`` simulated nodes (ids 1 to n, partition ids 0 to n-1).

    Use it as a context manager: leaving it ends the workers.

    Args:
        client_app: any Flower ClientApp.
        num_nodes: simulated SuperNodes.
        workers: forked processes; 1 answers in this process, one message per pull.
        shuffle: seed of a random order in which each batch of replies is handed out once all are there; None
            hands replies out as they come.

    Raises:
        ConfigError: for more than one worker on a system that cannot fork.
    """

    waits = True
    keyless = True

    def __init__(self, client_app: ClientApp, num_nodes: int, *, workers: int = 1, shuffle: int | None = None) -> None:
        if workers > 1 and "fork" not in multiprocessing.get_all_start_methods():
            raise ConfigError(f"engine.workers = {workers}: this system cannot fork processes; use 1 or engine=ray")
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, _RUN_ID, 0
        self.client_app = client_app
        self.num_nodes = num_nodes
        self.closed = False
        self._states = {node: RecordDict() for node in range(1, num_nodes + 1)}
        self._mail = _Mail()
        self._changed = threading.Condition()
        self._random = None if shuffle is None else random.Random(shuffle)  # noqa: S311 - order of arrival in tests
        self._workers = [_Worker(self) for _ in range(workers)] if workers > 1 else []
        for worker in self._workers:
            worker.start_feeding()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; messages that are not answered stay unanswered."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.stop()
        self._workers = []

    # ---- what a worker's thread calls --------------------------------------------------------------------------

    def next_job(self) -> _Job | None:
        """Block until a message waits; None when the grid is closed."""
        with self._changed:
            while not self._mail.waiting and not self.closed:
                self._changed.wait()
            return None if self.closed else self._mail.waiting.popleft()

    def deliver(self, job: _Job, reply: Message, state: RecordDict) -> None:
        """Put a reply where `pull_messages` finds it."""
        with self._changed:
            self._states[job.message.metadata.dst_node_id] = state
            if job.message.metadata.message_id not in self._mail.known:
                return
            reply.metadata.__dict__["_message_id"] = str(uuid4())
            self._mail.replies[job.message.metadata.message_id] = reply
            self._changed.notify_all()

    # ---- Flower's Grid -----------------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Any:
        """The one run.

        Raises:
            NotImplementedError: always; a simulation has no registered run.
        """
        raise NotImplementedError("an in-process grid has no registered run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as Flower's deprecated call does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all simulated nodes."""
        return list(self._states)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; returns their ids."""
        ids = []
        with self._changed:
            for message in messages:
                message.metadata.__dict__["_message_id"] = str(uuid4())
                ids.append(message.metadata.message_id)
                self._mail.waiting.append(_Job(message, self._states[message.metadata.dst_node_id]))
            self._mail.known.update(ids)
            self._changed.notify_all()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to those messages that are there; waits a moment for the first one."""
        wanted = set(message_ids) & self._mail.known
        if not self._workers:
            self._answer_one()
        with self._changed:
            ready = self._ready(wanted)  # draws from the seeded order: once per batch
            if not ready and (self._workers or not self._mail.waiting):
                self._changed.wait(_WAIT)
                ready = self._ready(wanted)
            replies = [self._mail.replies.pop(key) for key in ready]
            self._mail.known -= set(ready)
        return replies

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Drop messages whose replies nobody waits for any more, answered or not."""
        with self._changed:
            self._mail.known -= set(message_ids)
            self._mail.waiting = deque(
                job for job in self._mail.waiting if job.message.metadata.message_id in self._mail.known
            )
            for key in self._mail.replies.keys() - self._mail.known:
                del self._mail.replies[key]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and wait for their replies, at most ``timeout`` seconds."""
        waiting = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    def _ready(self, wanted: set[str]) -> list[str]:
        ready = [key for key in self._mail.replies if key in wanted]
        if self._random is None:
            return ready
        if len(ready) < len(wanted):
            return []
        ready.sort(key=lambda key: self._mail.replies[key].metadata.src_node_id)
        self._random.shuffle(ready)
        return ready

    def _answer_one(self) -> None:
        if self._mail.waiting:
            job = self._mail.waiting.popleft()
            reply, state = _answer(self.client_app, job, self.num_nodes)
            self.deliver(job, reply, state)


def default_workers() -> int:
    """One worker per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
