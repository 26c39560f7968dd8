"""Flower's own command, run as a process: which SuperNodes a SuperLink lets in. No import of Flower.

Its exit code is 0 whether it succeeded or not; what it prints as JSON says which. Without a connection of the
deployment's own it would start a SuperLink by itself, which stays: so none of it is run before the connection was
looked at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated.errors import DeploymentError

__all__ = ["CONNECTION", "FlowerLink", "KeyTaken", "live_nodes", "register_node", "unregister_node"]

CONNECTION = "deployment"
_SECONDS = 60.0
_ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "NO_COLOR": "1",
}
_LOOPBACK = "localhost,127.0.0.1,::1"
_GONE = ("unregistered", "deleted")
_IN_USE = "Public key already in use"
_START = "start the deployment once with 'fedpeft deploy up'"


class KeyTaken(DeploymentError):
    """The SuperLink has or had this key: it takes a key once."""


@dataclass(frozen=True)
class FlowerLink:
    """How Flower's command reaches the SuperLink.

    Args:
        home: ``FLWR_HOME``: holds ``config.toml`` with the connection.
        connection: its name there.
    """

    home: Path
    connection: str = CONNECTION


def live_nodes(link: FlowerLink) -> set[str]:
    """Ids of the nodes that the SuperLink lets in.

    Raises:
        DeploymentError: if it cannot be asked.
    """
    record = _flwr(link, "supernode", "list", link.connection)
    try:
        return {str(node["node-id"]) for node in record["nodes"] if node["status"] not in _GONE}
    except (KeyError, TypeError):
        raise DeploymentError("'flwr supernode list' answers in a way that this version does not read") from None


def register_node(link: FlowerLink, public_key_file: Path, *, name: str) -> str:
    """Let a key in.

    Args:
        link: to the SuperLink.
        public_key_file: one line of OpenSSH, P-384.
        name: shown by Flower.

    Returns:
        The node's id.

    Raises:
        KeyTaken: if the SuperLink has or had the key.
        DeploymentError: if it cannot be asked.
    """
    record = _flwr(link, "supernode", "register", str(public_key_file.absolute()), link.connection, "--name", name)
    return str(record["node-id"])


def unregister_node(link: FlowerLink, node_id: str) -> None:
    """End a node's part; its key is never taken again.

    Raises:
        DeploymentError: if the SuperLink cannot be asked, or has no such node.
    """
    _flwr(link, "supernode", "unregister", node_id, link.connection)


def _flwr(link: FlowerLink, *command: str) -> Mapping[str, Any]:
    """What a command of Flower's says in JSON.

    Raises:
        DeploymentError: if it did not succeed.
    """
    _check_connection(link)
    try:
        done = subprocess.run(
            [Path(sys.executable).parent / "flwr", *command, "--format", "json"],
            cwd=link.home,
            env=_environment(link),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeploymentError(
            f"the SuperLink did not answer within {_SECONDS:g} s; see its log, and try again"
        ) from None
    except OSError as error:
        raise DeploymentError(
            f"cannot start Flower's command 'flwr': {error.strerror}; install flwr beside Python"
        ) from None
    record = _record(done.stdout)
    if record.get("success") is not True:
        said = str(record.get("error-message", "")) or done.stderr or done.stdout
        raise (KeyTaken if _IN_USE in said else DeploymentError)(_fault(command, said))
    return record


def _check_connection(link: FlowerLink) -> None:
    """A missing connection would make Flower start a SuperLink of its own, which stays."""
    path = link.home / "config.toml"
    try:
        address = tomllib.loads(path.read_text(encoding="utf-8"))["superlink"][link.connection]["address"]
    except OSError as error:
        raise DeploymentError(f"cannot read {path}: {error.strerror}; {_START}") from None
    except (ValueError, KeyError, TypeError):
        raise DeploymentError(f"{path} names no address for the connection {link.connection!r}; {_START}") from None
    if not isinstance(address, str) or address.startswith(":"):
        raise DeploymentError(f"{path}: the connection {link.connection!r} has the address {address!r}; {_START}")


def _environment(link: FlowerLink) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    no_proxy = {
        name: ",".join(filter(None, [os.environ.get(name, ""), _LOOPBACK])) for name in ("no_proxy", "NO_PROXY")
    }
    return kept | _ENVIRONMENT | no_proxy | {"FLWR_HOME": str(link.home.absolute())}


def _record(text: str) -> Mapping[str, Any]:
    """The JSON in an output that may begin with other words."""
    try:
        found = json.loads(text[text.index("{") :])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _fault(command: Sequence[str], said: str) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in said).split())[-300:]
    if "is unavailable" in line:
        return "the SuperLink does not answer; start the deployment with 'fedpeft deploy up', which does what is left"
    return f"'flwr {' '.join(command[:2])}' did not succeed: {line or 'it said nothing'}"
