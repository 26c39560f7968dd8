"""A device's agent beside a server, in one process: the agent decides which version is active, the server answers.

Called by `federated.cli.serve`.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from federated.errors import DeviceError, FederatedError

if TYPE_CHECKING:
    from federated.device import AdapterRuntime, Agent, DeviceConfig, HealthReport, PersonalAdapters
    from federated.manifest import VersionManifest

__all__ = ["Beside", "agent_beside"]

_LOG = logging.getLogger("federated.device")
_STEP = 0.1
_LOOK = 0.5
"""Seconds between two looks at what other processes keep of personal adapters."""


@dataclass(frozen=True)
class Beside:
    """What a server shares with its agent.

    Args:
        runtime: the agent installs and activates in it.
        manifest: of the first version that was loaded.
        health: the server reports here; the agent commits a version, or gives it up, by it.
        troubled: why the agent cannot keep up with its channel, or None.
    """

    runtime: AdapterRuntime
    manifest: VersionManifest
    health: HealthReport
    troubled: Callable[[], str | None]


@contextmanager
def agent_beside(file: Path, app_dir: Path) -> Iterator[Beside]:
    """Run an agent in a thread while a server runs; waits until a first version is loaded.

    Args:
        file: the device's configuration.
        app_dir: where a relative path of the base model is looked up.

    Raises:
        FederatedError: if the configuration, the state folder or the base model cannot be used.
    """
    from federated.device import Agent, device_config, open_runtime

    settings = device_config(file)
    opened: Future[tuple[VersionManifest, AdapterRuntime]] = Future()

    def runtime_of(manifest: VersionManifest) -> AdapterRuntime:
        runtime = open_runtime(manifest, app_dir=app_dir, model=settings.base, capacity=settings.capacity)
        opened.set_result((manifest, runtime))
        return runtime

    agent = Agent(settings, runtime_of)
    threads = [threading.Thread(target=_work, args=(agent, opened), name="agent")]
    threads[0].start()
    try:
        manifest, runtime = _waited(opened)
        threads.append(threading.Thread(target=_follow, args=(runtime, settings, agent), name="personal"))
        threads[1].start()
        yield Beside(runtime, manifest, agent.health, lambda: _trouble(settings))
    finally:
        agent.stop()
        for thread in threads:
            thread.join()


def _work(agent: Agent, opened: Future[tuple[VersionManifest, AdapterRuntime]]) -> None:
    from federated.device import run

    try:
        run(agent)
    except Exception as error:  # noqa: BLE001 - the server's thread raises it, or goes on serving
        if opened.done():
            _LOG.error("the agent ended (%s); what is installed goes on", type(error).__name__)
        else:
            opened.set_exception(error)
    if not opened.done():
        opened.set_exception(DeviceError("the agent was stopped before a version was here"))


def _follow(runtime: AdapterRuntime, settings: DeviceConfig, agent: Agent) -> None:
    """Serve what the training client of this device keeps, as soon as it is there; damage is said once, and mended."""
    from federated.device import PersonalAdapters

    personal, said = PersonalAdapters(runtime, settings.state / "personal", follow=True), ""
    while not agent.wait(_LOOK):
        try:
            for name in personal.refresh():
                _LOG.info("personal adapter %s: %s", name, _standing(personal, name))
            said = ""
        except FederatedError as error:
            if str(error) != said:
                said = str(error)
                _LOG.warning("personal adapters: %s", said)


def _standing(personal: PersonalAdapters, name: str) -> str:
    if name not in personal.names():
        return "deleted"
    number = personal.standing(name).number
    return f"version {number} answers" if number else "nothing of its own answers"


def _waited(opened: Future[tuple[VersionManifest, AdapterRuntime]]) -> tuple[VersionManifest, AdapterRuntime]:
    """The result, once it is there; SIGTERM ends the wait as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            try:
                return opened.result(_STEP)
            except TimeoutError:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def _trouble(settings: DeviceConfig) -> str | None:
    from federated.device.agent_status import status_of

    try:
        found = status_of(settings, datetime.now(UTC))
    except FederatedError as error:
        return type(error).__name__
    if found.stale:
        return "ExpiredMetadata"
    return found.book.trouble.partition(":")[0] or (None if found.running else "the agent does not run")
