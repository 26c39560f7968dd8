"""What a state folder says of its device: for people, and as a report for the registry. Reads only; needs no agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from federated.device.agent_config import DeviceConfig
from federated.device.agent_lock import StateLock
from federated.device.journal import Book, Entry, read_book
from federated.device.shelf import Shelf

__all__ = ["DeviceStatus", "report_of", "status_of"]

_EXPIRED = ("ExpiredMetadata", "FreezeAttack")


@dataclass(frozen=True)
class DeviceStatus:
    """A device, as its journal has it.

    Args:
        running: whether an agent works now.
        stale: whether the metadata that were verified last have ended: what is installed serves, nothing new is taken.
        book: the journal.
        held: versions on the disk.
    """

    running: bool
    stale: bool
    book: Book
    held: tuple[str, ...]


def status_of(config: DeviceConfig, now: datetime) -> DeviceStatus:
    """Look at a device.

    Raises:
        DeviceError: if its journal is damaged.
        ReleaseError: if it cannot be read.
    """
    book = read_book(config.state) or Book()
    ended = bool(book.fresh_until) and datetime.fromisoformat(book.fresh_until) < now
    stale = ended or book.trouble.partition(":")[0] in _EXPIRED
    return DeviceStatus(StateLock(config.state).is_held(), stale, book, tuple(Shelf(config.state / "versions").ids()))


def report_of(config: DeviceConfig, now: datetime) -> Mapping[str, Any]:
    """What this device held, from when to when, and what became of each version: plain data without any input.

    ``fedpeft registry devices FILE`` reads it. It is not signed: take it from people that you trust.

    Raises:
        DeviceError, ReleaseError: see `status_of`.
    """
    found = status_of(config, now)
    until = now.isoformat(timespec="seconds")
    versions = [_told(one, until if one.version_id in found.held else "") for one in found.book.versions.values()]
    return {
        "format": 1,
        "device_id": config.device_id,
        "made_at": until,
        "channel": config.channel,
        "active": found.book.active,
        "stale": found.stale,
        "versions": sorted(versions, key=lambda one: str(one["version_id"])),
    }


def _told(entry: Entry, until: str) -> dict[str, Any]:
    """One version; ``held`` only if it ever was on the disk."""
    since = entry.times.get("staged")
    held = {} if since is None else {"held": {"from": since, "to": until or max(entry.times.values())}}
    return {"version_id": entry.version_id, "state": entry.state, "code": entry.code, "reason": entry.reason, **held}
