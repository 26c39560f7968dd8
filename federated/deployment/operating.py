"""The operator's process beside the SuperLink: keeps runs going, and Flower's list of nodes in step with the book.

It serves the status page too (`federated.deployment.status_page`).

Run as ``python -m federated.deployment.operating FOLDER``.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from federated.deployment.devices import DeviceBook
from federated.deployment.flwr_command import FlowerLink
from federated.deployment.layout import Layout
from federated.deployment.nodes import sync_nodes
from federated.deployment.overview import Gatherer
from federated.deployment.runs import Runs
from federated.deployment.server_config import ServerConfig, read_server_config
from federated.deployment.status_page import StatusServer
from federated.errors import DeploymentError, FederatedError
from federated.logs import set_up_logs

__all__ = ["keep"]

_LOG = logging.getLogger(__name__)
_LOOK = 2.0  # seconds
_ASK_EVERY = 4  # looks


def keep(folder: Path, stop: threading.Event) -> None:
    """Register devices that were approved, end those that were revoked, resume runs that died, until ``stop`` is set.

    Raises:
        ConfigError: if the deployment's configuration cannot be read.
        DeploymentError: if the book of devices cannot be opened.
    """
    layout, config = Layout(folder), read_server_config(folder)
    runs, said = Runs(layout, config), dict[str, str]()
    book = None if config.insecure else DeviceBook(folder, clock=lambda: datetime.now(UTC))
    looks = 0
    with _status_page(layout, config):
        while not stop.wait(_LOOK):
            if book is not None:
                _tried("the list of devices", said, lambda: _step_nodes(book, layout))
            if config.keep_going:
                _tried("the runs", said, partial(_step_runs, runs, said, ask=looks % _ASK_EVERY == 0))
            looks += 1


@contextmanager
def _status_page(layout: Layout, config: ServerConfig) -> Iterator[None]:
    """The page, while the block runs; without it, where its port is taken: runs must go on all the same."""
    try:
        server = StatusServer(Gatherer(layout, config), config.status_port)
    except OSError as error:
        _LOG.warning("no status page on port %d: %s; choose another status_port", config.status_port, error.strerror)
        yield
        return
    with server:
        yield


def _tried(
    what: str, said: dict[str, str], work: Callable[[], None], *, through: tuple[type[Exception], ...] = ()
) -> None:
    """Do it, and say once why it cannot be done: it is tried again at the next look.

    Raises:
        Exception: one of ``through``.
    """
    try:
        work()
        said[what] = ""
    except through:
        raise
    except (FederatedError, OSError) as error:  # a full disk may have room again
        if said.get(what) != str(error):
            _LOG.warning("cannot look after %s: %s", what, error)
        said[what] = str(error)
    except Exception as error:  # noqa: BLE001 - whatever one run's files hold, the others are looked after
        if said.get(what) != repr(error):
            _LOG.exception("cannot look after %s", what)
        said[what] = repr(error)


def _step_nodes(book: DeviceBook, layout: Layout) -> None:
    """Ask Flower only when the book has something new: it takes a second of processor time."""
    devices = [entry for one in book.devices() for entry in (one, *book.entries(one.client_id))]
    if any((one.state == "approved") != bool(one.node_id) for one in devices if one.state in ("approved", "revoked")):
        done = sync_nodes(book, FlowerLink(layout.flwr_home), actor="operator")
        if done.registered or done.unregistered:
            _LOG.info("let in: %s; ended: %s", ", ".join(done.registered) or "-", ", ".join(done.unregistered) or "-")


def _step_runs(runs: Runs, said: dict[str, str], *, ask: bool) -> None:
    """A SuperLink that does not answer ends the look: each run would wait for it again, and so would the devices."""
    for name in runs.names:
        _tried(f"run {name}", said, partial(_step_run, runs, name, ask=ask), through=(DeploymentError,))


def _step_run(runs: Runs, name: str, *, ask: bool) -> None:
    made = runs.keep_going(name, ask=ask)
    if made is not None:
        _LOG.warning("run %s died and goes on, attempt %d", name, len(made.flower_runs), extra={"run": name})


if __name__ == "__main__":
    os.umask(0o077)
    _FOLDER = Path(sys.argv[1]).resolve()
    set_up_logs("operator", read_server_config(_FOLDER).log_format)
    keep(_FOLDER, threading.Event())
