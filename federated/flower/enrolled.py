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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated.errors import ConfigError

__all__ = ["FORMAT", "Device", "read_devices"]

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


def read_devices(path: Path) -> Mapping[str, Device]:
    """Client id to device, of those that are approved.

    Raises:
        ConfigError: if the file cannot be read or is not of this format: nobody is let in then.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ConfigError(f"admission.devices = {path}: format {found['format']!r}, expected {FORMAT}")
        devices = [_device(name, one) for name, one in found["devices"].items() if one["state"] == "approved"]
    except OSError as error:
        raise ConfigError(f"admission.devices = {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"admission.devices = {path}: not a file of enrolled devices: {error!r}") from None
    return {device.client_id: device for device in devices}


def _device(client_id: str, one: Mapping[str, Any]) -> Device:
    parts = str(one["node_key"]).split()
    try:
        update_key = base64.b64decode(one["update_key"], validate=True)
    except binascii.Error:
        update_key = b""
    if len(update_key) != _KEY_BYTES or len(parts) < _LINE_PARTS:
        raise ValueError(f"device {client_id!r} has no usable keys")
    return Device(client_id, " ".join(parts[:_LINE_PARTS]), update_key)
