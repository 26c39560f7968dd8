"""Channels: named pointers that move by compare-and-set, and only between versions of one base model.

Works inside the caller's transaction, so that a version and the pointer at it appear together.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from federated.errors import BaseMismatch, ChannelConflict
from federated.registry.names import check_channel_name
from federated.registry.schema import ChannelRow, VersionRow

__all__ = ["compare", "point"]


def compare(session: Session, channel: str, expected: str | None) -> None:
    """Check that the channel still points where the caller saw it.

    Args:
        session: the transaction.
        channel: its name.
        expected: a version id, or None if the channel must not exist yet.

    Raises:
        ChannelConflict: naming what was found.
        RegistryError: if the name is malformed.
    """
    check_channel_name(channel)
    row = session.get(ChannelRow, channel, with_for_update=True)
    found = None if row is None else row.version_id
    if found != expected:
        raise ChannelConflict(
            f"channel {channel!r} points at {found or 'nothing'}, expected {expected or 'nothing'}: "
            f"it moved meanwhile; read it again, then decide"
        )


def point(session: Session, channel: str, row: VersionRow, *, now: datetime) -> None:
    """Make the channel point at ``row``; a new channel is made.

    Raises:
        BaseMismatch: if the channel points at a version of another base model.
        RegistryError: if the name is malformed.
    """
    check_channel_name(channel)
    moved_at = now.astimezone(UTC).replace(tzinfo=None)
    pointer = session.get(ChannelRow, channel, with_for_update=True)
    if pointer is None:
        session.add(ChannelRow(name=channel, version_id=row.version_id, moved_at=moved_at))
        return
    base = session.scalars(select(VersionRow.base_digest).where(VersionRow.version_id == pointer.version_id)).one()
    if base != row.base_digest:
        raise BaseMismatch(
            f"channel {channel!r} serves base model {base}, version {row.version_id} belongs to {row.base_digest}: "
            f"devices on this channel could not load it; use another channel"
        )
    pointer.version_id = row.version_id
    pointer.moved_at = moved_at
