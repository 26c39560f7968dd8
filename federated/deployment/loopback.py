"""What processes of one machine need of each other: free ports, and a secret that only their owner reads."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from federated.deployment.secret_files import SECRET, write_if_missing

__all__ = ["free_ports", "shared_secret"]

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


def shared_secret(path: Path) -> Path:
    """The file by which a process proves itself to another: else any user of the machine could stand in its place.

    Raises:
        DeploymentError: if it is not there and cannot be written.
    """
    write_if_missing(path, secrets.token_bytes(_SECRET_BYTES), mode=SECRET)
    return path
