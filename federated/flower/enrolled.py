"""Who may take part: the file of enrolled devices, as the server's strategy reads it.

``devices.json`` is written by `federated.deployment` whenever a device is approved or revoked:

    {"format": 1, "devices": {"clinic-north": {"state": "approved", "node_key": "ecdsa-sha2-nistp384 AAAA...",
                                               "update_key": "<base64 of 32 bytes>"}}}

``node_key`` is the OpenSSH line of the key that Flower authenticates the SuperNode with, ``update_key`` the raw Ed25519
key that signs the client's updates. Only the state ``approved`` lets a device take part. The file is read anew for each
round: what is revoked takes no part in the next.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federated.errors import ConfigError

__all__ = ["FORMAT", "Device", "Enrolment", "read_devices", "read_enrolment"]

FORMAT = 1
_KEY_BYTES = 32
_LINE_PARTS = 2


@dataclass(frozen=True)
class Device:
    """One enrolled device that may take part.

    Args:
        client_id: the name that the operator gave it.
        node_key: kind and body of its OpenSSH public key, without a comment.
        update_key: raw Ed25519 public key, 32 bytes.
    """

    client_id: str
    node_key: str
    update_key: bytes


@dataclass(frozen=True)
class Enrolment:
    """The whole file: those that may take part, and why the others may not.

    Args:
        devices: client id to device, of those that are approved.
        others: client id to state, of the others.
        names: node key to client id, of all that name one; who is approved comes before who is not.
    """

    devices: Mapping[str, Device] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def name_of(self, node_key: str) -> str | None:
        """The client that a node key was enrolled for, if any."""
        return self.names.get(node_key)


def read_devices(path: Path) -> Mapping[str, Device]:
    """Client id to device, of those that are approved.

    Raises:
        ConfigError: as `read_enrolment` does.
    """
    return read_enrolment(path).devices


def read_enrolment(path: Path) -> Enrolment:
    """Read the file.

    Raises:
        ConfigError: if it cannot be read, is not of this format, or has one node key for two approved devices: nobody
            is let in then.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ConfigError(f"admission.devices = {path}: format {found['format']!r}, expected {FORMAT}")
        devices = {name: _device(name, one) for name, one in found["devices"].items() if one["state"] == "approved"}
        rest = {name: one for name, one in found["devices"].items() if name not in devices}
        names = {line: name for name, one in rest.items() if (line := _key_line(one.get("node_key", "")))}
        states = {name: str(one["state"]) for name, one in rest.items()}
        return Enrolment(devices, states, names | _names(devices.values()))
    except OSError as error:
        raise ConfigError(f"admission.devices = {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"admission.devices = {path}: not a file of enrolled devices: {error!r}") from None


def _names(devices: Iterable[Device]) -> dict[str, str]:
    names: dict[str, str] = {}
    for device in devices:
        if device.node_key in names:
            raise ValueError(f"{names[device.node_key]!r} and {device.client_id!r} have the same node key")
        names[device.node_key] = device.client_id
    return names


def _key_line(text: object) -> str:
    """Kind and body of a key, without its comment."""
    return " ".join(str(text).split()[:_LINE_PARTS])


def _device(client_id: str, one: Mapping[str, Any]) -> Device:
    node_key = _key_line(one["node_key"])
    try:
        update_key = base64.b64decode(one["update_key"], validate=True)
    except binascii.Error:
        update_key = b""
    if len(update_key) != _KEY_BYTES or len(node_key.split()) < _LINE_PARTS:
        raise ValueError(f"device {client_id!r} has no usable keys")
    return Device(client_id, node_key, update_key)
