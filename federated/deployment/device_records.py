"""What the book of devices holds, as plain records. `federated.deployment.devices` hands them out."""

from __future__ import annotations

import base64
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, cast

from federated.errors import EnrolmentRefused

__all__ = ["Claim", "Device", "KeysUsed", "LogEntry", "OpenInvitation", "State", "device_of", "published", "time_text"]

State = Literal["pending", "approved", "revoked"]


class KeysUsed(EnrolmentRefused):
    """Good token, but a key that another entry has: keys of a revoked device are never taken again."""


@dataclass(frozen=True)
class Claim:
    """What a device asks with, its proofs checked.

    Args:
        client_id: the name in its invitation.
        token_sha256: of its token.
        node_key: OpenSSH line without a comment.
        update_key: 32 bytes.
        address: where it asks from, for the log.
    """

    client_id: str
    token_sha256: bytes
    node_key: str
    update_key: bytes
    address: str = ""


@dataclass(frozen=True)
class Device:
    """One entry.

    Args:
        number: of the entry; a name that was invited again has several.
        client_id: its name.
        node_key: OpenSSH line without a comment.
        update_key: 32 bytes.
        state: ``pending``, ``approved`` or ``revoked``.
        enrolled_at: when it asked, ISO 8601, UTC; so are the next two, empty where it did not happen.
        approved_at: when it was let in.
        revoked_at: when that ended.
        remark: the reason of its revocation.
        node_id: under which Flower knows its node key; empty while Flower does not.
        registering: Flower was asked to register the key, and its answer was not noted yet: ids of the nodes that it
            let in then and the book did not know. None otherwise.
    """

    number: int
    client_id: str
    node_key: str
    update_key: bytes
    state: State
    enrolled_at: str
    approved_at: str
    revoked_at: str
    remark: str
    node_id: str
    registering: tuple[str, ...] | None


@dataclass(frozen=True)
class OpenInvitation:
    """An invitation that can still be used, as far as the book knows.

    Args:
        client_id: whom it invites.
        made_at: ISO 8601, UTC.
        expires_at: likewise.
        auto_approve: whether the device is let in without a word of the operator.
    """

    client_id: str
    made_at: str
    expires_at: str
    auto_approve: bool


@dataclass(frozen=True)
class LogEntry:
    """Who did what: ``number`` counts, ``at`` is ISO 8601 in UTC."""

    number: int
    at: str
    actor: str
    action: str
    client_id: str
    detail: str


def device_of(row: sqlite3.Row) -> Device:
    """From a row of the table."""
    return Device(
        number=row["number"],
        client_id=row["client_id"],
        node_key=row["node_key"],
        update_key=row["update_key"],
        state=cast("State", row["state"]),
        enrolled_at=row["enrolled_at"],
        approved_at=row["approved_at"] or "",
        revoked_at=row["revoked_at"] or "",
        remark=row["remark"],
        node_id=row["node_id"],
        registering=None if row["registering"] is None else tuple(row["registering"].split()),
    )


def published(device: Device) -> dict[str, str]:
    """What the strategy reads of a device."""
    update_key = base64.b64encode(device.update_key).decode()
    return {"state": device.state, "node_key": device.node_key, "update_key": update_key}


def time_text(moment: datetime) -> str:
    """ISO 8601 in UTC to the second: later moments are greater texts."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")
