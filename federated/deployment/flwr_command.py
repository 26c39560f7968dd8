"""Flower's own command, run as a process, with the operator's connection to the deployment's SuperLink.

Open-source Flower asks nobody who reaches the SuperLink for a password; this one listens on loopback alone. The
command's exit code is 0 whether it succeeded or not; what it prints as JSON says which. Without a connection of the
deployment's own it would start a SuperLink by itself, which stays: so none of it is run before the connection was
looked at. No import of Flower.
"""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated.deployment.flower_environment import environment, program
from federated.deployment.layout import Layout
from federated.deployment.server_config import ServerConfig
from federated.errors import DeploymentError
from federated.files import write_whole

__all__ = [
    "CONNECTION",
    "FlowerLink",
    "KeyTaken",
    "live_nodes",
    "register_node",
    "toml_text",
    "unregister_node",
    "write_connection",
]

CONNECTION = "deployment"
_SECONDS = 120.0
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

    def call(self, *command: str) -> str:
        """Run a command, and give what it printed.

        Raises:
            DeploymentError: if it failed, with its last words; most often because the SuperLink is not up.
        """
        done = self._done(command)
        if done.returncode:
            raise DeploymentError(_fault(command, f"{done.stdout} {done.stderr}"))
        return done.stdout

    def record(self, *command: str) -> Mapping[str, Any]:
        """What a command says in JSON.

        Raises:
            KeyTaken: if it is told so.
            DeploymentError: if it did not succeed.
        """
        done = self._done((*command, "--format", "json"))
        record = _record(done.stdout)
        if done.returncode or record.get("success", bool(record)) is not True:
            said = str(record.get("error-message", "")) or done.stderr or done.stdout
            raise (KeyTaken if _IN_USE in said else DeploymentError)(_fault(command, said))
        return record

    def _done(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        _check_connection(self)
        try:
            return subprocess.run(
                [program("flwr"), *command],
                cwd=self.home,
                env={**environment(self.home.absolute()), "NO_COLOR": "1", "COLUMNS": "200"},
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


def toml_text(text: str) -> str:
    r"""A text as TOML writes it: as JSON does, but that it knows no halves of characters, and DEL not raw.

    >>> toml_text("a 'b'")
    '"a \'b\'"'
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_connection(layout: Layout, config: ServerConfig) -> None:
    """Write ``config.toml`` in Flower's home: where the SuperLink is, and whose certificate it has.

    Raises:
        OSError: as the file system raises it.
    """
    trust = "insecure = true" if config.insecure else f"root-certificates = {toml_text(str(layout.ca))}"
    address = f"127.0.0.1:{config.superlink_port}"
    text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n{trust}\n'
    layout.flwr_home.mkdir(parents=True, exist_ok=True)
    write_whole(layout.flwr_home / "config.toml", text.encode())


def live_nodes(link: FlowerLink) -> set[str]:
    """Ids of the nodes that the SuperLink lets in.

    Raises:
        DeploymentError: if it cannot be asked.
    """
    record = link.record("supernode", "list", link.connection)
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
    record = link.record("supernode", "register", str(public_key_file.absolute()), link.connection, "--name", name)
    return str(record["node-id"])


def unregister_node(link: FlowerLink, node_id: str) -> None:
    """End a node's part; its key is never taken again.

    Raises:
        DeploymentError: if the SuperLink cannot be asked, or has no such node.
    """
    link.record("supernode", "unregister", node_id, link.connection)


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
    verb = " ".join(word for word in command[:2] if word.isalpha())
    return f"'flwr {verb}' did not succeed: {line or 'it said nothing'}"
