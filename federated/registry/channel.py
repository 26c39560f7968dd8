"""A channel in the hand: promote, roll back, ask for approvals, approve.

Made by `Registry.channel`. Each call is one transaction: the move, its history and the audit log's row are there
together or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from federated.errors import RegistryError
from federated.registry.access import Access
from federated.registry.approvals import approve, approvers, require
from federated.registry.channels import (
    ANYWHERE,
    Expected,
    Move,
    check_known,
    compare,
    history_of,
    point,
    step_back,
)
from federated.registry.lookup import records_of
from federated.registry.names import check_channel_name, resolve
from federated.registry.records import VersionRecord
from federated.registry.schema import ChannelRow, PolicyRow

__all__ = ["Channel", "ChannelState", "channel_states"]


@dataclass(frozen=True)
class ChannelState:
    """A channel as it is now.

    Args:
        name: of the channel.
        version_id: where it points; None where it was never promoted to.
        moved_at: since when, UTC.
        approvals: how many people must approve what it moves to.
    """

    name: str
    version_id: str | None
    moved_at: datetime | None
    approvals: int


class Channel:
    """One channel of an open registry.

    Args:
        access: the registry's.
        name: of the channel; checked when it is used.
    """

    def __init__(self, access: Access, name: str) -> None:
        self._access = access
        self.name = name

    def promote(
        self, version: str, *, expected: Expected = ANYWHERE, details: Mapping[str, Any] | None = None
    ) -> VersionRecord:
        """Make the channel point at a version; changes nothing where it does already.

        Args:
            version: a name as in `Registry.get`.
            expected: id that the channel must point at now; None makes a new channel.
            details: for the audit log: why, in plain data.

        Returns:
            The version that it points at now.

        Raises:
            ChannelConflict: if it points elsewhere.
            BaseMismatch: if it points at a version of another base model.
            NotApproved: if it requires more approvals than the version has.
            VersionNotFound: if no version, or more than one, matches.
            RegistryError: if nobody made a channel of that name.
        """
        with self._access.writing("promote a version") as work:
            row = resolve(work.session, version)
            compare(work.session, self.name, expected)
            point(work, self.name, row, **(details or {}))
            work.session.flush()
            return records_of(work.session, [row])[0]

    def rollback(self, to: str | None = None, *, expected: Expected = ANYWHERE) -> VersionRecord:
        """Make the channel point at what it pointed at before.

        Args:
            to: an earlier version of this channel's history; None: the one before. Rolling back once more goes on
                from there: what was rolled back from is not returned to.
            expected: id that the channel must point at now.

        Returns:
            The version that it points at now.

        Raises:
            ChannelConflict: if it points elsewhere.
            VersionNotFound: if no version, or more than one, matches.
            RegistryError: if it did not point there before, or that version is gone.
        """
        with self._access.writing("roll a channel back") as work:
            pointer = compare(work.session, self.name, expected)
            if pointer is None:
                raise RegistryError(f"channel {self.name!r} points at nothing yet; there is nothing to roll back")
            row = step_back(work, pointer, None if to is None else resolve(work.session, to))
            work.session.flush()
            return records_of(work.session, [row])[0]

    def require(self, approvals: int) -> None:
        """Let the channel move only to versions that so many different people approved; 0 lifts that.

        Makes the channel where there is none of that name.

        Raises:
            RegistryError: if the name or the number makes no sense.
        """
        with self._access.writing("require approvals") as work:
            check_channel_name(self.name)
            require(work, self.name, approvals)

    def approve(self, version: str, *, name: str) -> list[str]:
        """Approve a version for this channel; once more changes nothing.

        Args:
            version: a name as in `Registry.get`.
            name: of the person who approves.

        Returns:
            Everybody who approved it for this channel.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            RegistryError: if nobody made a channel of that name, or the person's name is empty.
        """
        with self._access.writing("approve a version") as work:
            check_known(work.session, self.name)
            row = resolve(work.session, version)
            approve(work, self.name, row, name)
            work.session.flush()
            return approvers(work.session, self.name, row.version_id)

    def approvers(self, version: str) -> list[str]:
        """Who approved a version for this channel.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
        """
        with self._access.reading("read approvals") as session:
            return approvers(session, self.name, resolve(session, version).version_id)

    def history(self) -> list[Move]:
        """All moves, newest first; those of the registry's first form were not recorded."""
        with self._access.reading("read a channel's history") as session:
            return history_of(session, self.name)


def channel_states(session: Session) -> list[ChannelState]:
    """All channels that point somewhere or have a policy, by name."""
    policies = {row.channel: row.approvals for row in session.scalars(select(PolicyRow))}
    pointers = {row.name: row for row in session.scalars(select(ChannelRow))}
    return [_state(name, pointers.get(name), policies.get(name, 0)) for name in sorted({*policies, *pointers})]


def _state(name: str, row: ChannelRow | None, approvals: int) -> ChannelState:
    if row is None:
        return ChannelState(name, None, None, approvals)
    return ChannelState(name, row.version_id, row.moved_at.replace(tzinfo=UTC), approvals)
