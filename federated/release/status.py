"""What a repository says of itself: roles, how long they last, whose keys count, and where channels point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from federated.release import shelf
from federated.release.edition import Edition
from federated.release.keys import KeyRing, label_of
from federated.release.records import ReleaseRecord
from federated.release.roles import ROOT, SNAPSHOT, TARGETS, TIMESTAMP

__all__ = ["ChannelStatus", "RoleStatus", "Status", "status_of"]


@dataclass(frozen=True)
class RoleStatus:
    """One role.

    Args:
        name: of the role.
        version: of its metadata.
        expires: UTC.
        expired: by the clock that was given.
        threshold: signatures that are needed.
        keys: labels of its keys.
        held: those of them that are at hand.
    """

    name: str
    version: int
    expires: datetime
    expired: bool
    threshold: int
    keys: tuple[str, ...]
    held: tuple[str, ...]


@dataclass(frozen=True)
class ChannelStatus:
    """One channel.

    Args:
        name: of the channel.
        current: what it points at; None where nothing was published.
        revoked: whether that is below its security floor: devices refuse it.
    """

    name: str
    current: ReleaseRecord | None
    revoked: bool


@dataclass(frozen=True)
class Status:
    """A repository: its roles, its channels, and the security floors by adapter."""

    roles: tuple[RoleStatus, ...]
    channels: tuple[ChannelStatus, ...]
    floors: Mapping[str, int]


def status_of(edition: Edition, ring: KeyRing, now: datetime) -> Status:
    """Look at an edition."""
    names = (ROOT, TARGETS, SNAPSHOT, TIMESTAMP, *edition.channels)
    channels = [(name, shelf.current(edition, name)) for name in edition.channels]
    return Status(
        tuple(_role(edition, name, ring, now) for name in names),
        tuple(ChannelStatus(name, one, one is not None and shelf.is_revoked(edition, one)) for name, one in channels),
        shelf.floors(edition),
    )


def _role(edition: Edition, name: str, ring: KeyRing, now: datetime) -> RoleStatus:
    top = {ROOT: edition.root, SNAPSHOT: edition.snapshot, TIMESTAMP: edition.timestamp}
    signed = top[name] if name in top else edition.role(name)
    threshold, keys = edition.needs(name)
    held = tuple(label_of(key) for key in keys if ring.holds(key.keyid))
    return RoleStatus(
        name, signed.version, signed.expires, signed.is_expired(now), threshold, tuple(map(label_of, keys)), held
    )
