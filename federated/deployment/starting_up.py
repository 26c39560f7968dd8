"""Bringing a deployment up: its files once, its processes, its devices, in the order in which each needs the other."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from federated.deployment.certificates import make_ca, make_server_certificate
from federated.deployment.devices import DeviceBook
from federated.deployment.layout import Layout
from federated.deployment.links import Link
from federated.deployment.processes import Processes, programs_of
from federated.deployment.server_config import ServerConfig, read_server_config, write_server_config
from federated.errors import ConfigError, DeploymentError

__all__ = ["bring_up", "free_ports", "make_deployment"]

_PATIENCE = 90.0
_ENDING = 15.0
_SECRET_BYTES = 32


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has at the moment."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


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
        with os.fdopen(os.open(layout.secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_SECRET_BYTES))
        if not config.insecure:
            _certify(layout, config)
            DeviceBook(folder, clock=_now).write_devices_file()
        Link(layout, config).write_connection()
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
        _check_ports([config.superlink_port, config.door_port, config.status_port])
    Link(layout, config).write_connection()
    processes.start(programs_of(layout, config))
    for name, port in (("superlink", config.superlink_port), ("door", config.door_port)):
        say(f"waiting for the {name} on port {port}")
        _wait(port, name, layout)
    return layout, config, processes


def _check_ports(ports: Sequence[int]) -> None:
    """What a killed manager left behind is ending, and gets a moment for it."""
    end = time.monotonic() + _ENDING
    while taken := [port for port in ports if _answers(port)]:
        if time.monotonic() > end:
            raise DeploymentError(f"port {taken[0]} is in use by another program; choose another in server.yaml")
        time.sleep(0.2)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(port: int, name: str, layout: Layout) -> None:
    end = time.monotonic() + _PATIENCE
    while not _answers(port):
        if time.monotonic() > end:
            log = layout.logs / f"{name}.log"
            raise DeploymentError(f"the {name} did not come up in {_PATIENCE:.0f} s; its log is {log}")
        time.sleep(0.2)
