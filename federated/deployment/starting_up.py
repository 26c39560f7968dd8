"""Bringing a deployment up: its files once, its processes, its devices, in the order in which each needs the other."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from federated.deployment.certificates import make_ca, make_server_certificate
from federated.deployment.devices import DeviceBook
from federated.deployment.flwr_command import write_connection
from federated.deployment.layout import Layout
from federated.deployment.loopback import shared_secret
from federated.deployment.processes import Processes, programs_of
from federated.deployment.server_config import ServerConfig, read_server_config, write_server_config
from federated.errors import ConfigError, DeploymentError

__all__ = ["alone", "bring_up", "make_deployment"]

_LOOPBACK = "127.0.0.1"
_PATIENCE = 90.0
_ENDING = 15.0


def make_deployment(folder: Path, config: ServerConfig) -> Layout:
    """Make a deployment's folder: configuration, certificates, secret, connection. Nothing is started.

    Raises:
        ConfigError: if there is one already.
        DeploymentError: if it cannot be written.
    """
    layout = Layout(folder)
    if (folder / "server.yaml").exists():
        raise ConfigError(f"{folder} holds a deployment already; edit its server.yaml, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)  # it may have been made by hand
        shared_secret(layout.secret)
        if not config.insecure:
            _certify(layout, config)
            DeviceBook(folder, clock=_now).write_devices_file()
        write_connection(layout, config)
        for place in (layout.runs, layout.logs, layout.nodes):
            place.mkdir(exist_ok=True, mode=0o700)
        write_server_config(folder, config)  # last: what has one is whole
    except OSError as error:
        raise DeploymentError(f"cannot make a deployment in {folder}: {error.strerror}") from None
    return layout


def _certify(layout: Layout, config: ServerConfig) -> None:
    authority = make_ca(layout.tls, name=config.name, clock=_now)
    hosts = list(dict.fromkeys([*config.hosts, "127.0.0.1", "localhost"]))
    make_server_certificate(layout.tls, authority, hosts=hosts, clock=_now)


def _now() -> datetime:
    return datetime.now(UTC)


def bring_up(folder: Path, *, say: Callable[[str], object]) -> tuple[Layout, ServerConfig, Processes]:
    """Start the processes of a deployment and wait until the SuperLink and the door answer.

    Args:
        folder: of the deployment.
        say: is told what is waited for.

    Raises:
        ConfigError: if there is no deployment.
        DeploymentError: if a process does not come up; its log is named.
    """
    layout, config = Layout(folder), read_server_config(folder)
    processes = Processes(layout)
    if not processes.running:
        _check_ports([(_LOOPBACK, config.superlink_port), _door(config), (_LOOPBACK, config.status_port)])
    write_connection(layout, config)
    processes.start(programs_of(layout, config))
    for name, host, port in (("superlink", _LOOPBACK, config.superlink_port), ("door", *_door(config))):
        say(f"waiting for the {name} on port {port}")
        _wait(host, port, name, layout)
    return layout, config, processes


@contextmanager
def alone(folder: Path, *, say: Callable[[str], object] = lambda _: None) -> Iterator[None]:
    """Be the only one who makes or starts the deployment in a folder; who is at it is waited for.

    Args:
        folder: of the deployment.
        say: is told when somebody is at it.

    Raises:
        DeploymentError: if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / ".up.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DeploymentError(f"cannot make a deployment in {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another command is starting the deployment in {folder}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _door(config: ServerConfig) -> tuple[str, int]:
    """Where the door answers on this machine."""
    return {"0.0.0.0": _LOOPBACK, "::": "::1"}.get(config.door_host, config.door_host), config.door_port  # noqa: S104


def _check_ports(places: Sequence[tuple[str, int]]) -> None:
    """What a killed manager left behind is ending, and gets a moment for it."""
    end = time.monotonic() + _ENDING
    while taken := [port for host, port in places if _answers(host, port)]:
        if time.monotonic() > end:
            raise DeploymentError(f"port {taken[0]} is in use by another program; choose another in server.yaml")
        time.sleep(0.2)


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5.0):
            return True
    except OSError:
        return False


def _wait(host: str, port: int, name: str, layout: Layout) -> None:
    end = time.monotonic() + _PATIENCE
    while not _answers(host, port):
        if time.monotonic() > end:
            log = layout.logs / f"{name}.log"
            raise DeploymentError(f"the {name} did not come up in {_PATIENCE:.0f} s; its log is {log}")
        time.sleep(0.2)
