"""Channels inside a transaction: pointers that move by compare-and-set, approved where that is asked for.

A channel moves only between versions of one base model. Each move stands on the one that it went on from, so that a
rollback knows where to go: promoting A, B, C and rolling back twice ends at A, and what was rolled back from is not
returned to. `federated.registry.channel` is what users hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from federated.errors import BaseMismatch, ChannelConflict, RegistryError
from federated.registry.access import Transaction
from federated.registry.approvals import check_approved
from federated.registry.names import check_channel_name, find
from federated.registry.schema import ChannelRow, MoveRow, PolicyRow, VersionRow

__all__ = ["ANYWHERE", "Expected", "Move", "check_known", "compare", "history_of", "point", "step_back"]


class _Anywhere(Enum):
    ANYWHERE = "anywhere"


ANYWHERE = _Anywhere.ANYWHERE
"""Move the channel wherever it points now."""

Expected = str | None | Literal[_Anywhere.ANYWHERE]
"""Where the caller saw a channel point: a version's id, None for nothing yet, or `ANYWHERE`."""

_USUAL = ("dev", "canary", "stable")


@dataclass(frozen=True)
class Move:
    """One move of a channel.

    Args:
        version_id: where it went; that version may be gone from the registry.
        action: ``promote`` or ``rollback``; ``upgrade`` for where it pointed before moves were recorded.
        actor: who moved it, as they said.
        moved_at: when, UTC.
    """

    version_id: str
    action: str
    actor: str
    moved_at: datetime


def history_of(session: Session, channel: str) -> list[Move]:
    """All moves of a channel, newest first."""
    rows = session.scalars(select(MoveRow).where(MoveRow.channel == channel).order_by(MoveRow.sequence.desc()))
    return [Move(row.version_id, row.action, row.actor, row.moved_at.replace(tzinfo=UTC)) for row in rows]


def check_known(session: Session, channel: str) -> None:
    """Refuse a channel that nobody made, which is likely a typing error; dev, canary and stable need not be made.

    Raises:
        RegistryError: naming those that there are.
    """
    check_channel_name(channel)
    known = {*_USUAL, *session.scalars(select(ChannelRow.name)), *session.scalars(select(PolicyRow.channel))}
    if channel not in known:
        raise RegistryError(
            f"there is no channel {channel!r}; expected one of {', '.join(sorted(known))}; to make a new one, promote "
            f"a version to it and say that it points at nothing yet (--expect nothing)"
        )


def compare(session: Session, channel: str, expected: Expected) -> ChannelRow | None:
    """The channel's row, if it points where the caller saw it.

    Raises:
        ChannelConflict: naming what was found.
        RegistryError: if the name is malformed, or no channel is called that and the caller did not say so.
    """
    check_channel_name(channel)
    if expected is not None:
        check_known(session, channel)
    row = session.get(ChannelRow, channel, with_for_update=True)
    found = None if row is None else row.version_id
    if expected is not ANYWHERE and found != expected:
        raise ChannelConflict(
            f"channel {channel!r} points at {found or 'nothing'}, expected {expected or 'nothing'}: "
            f"it moved meanwhile; read it again, then decide"
        )
    return row


def point(work: Transaction, channel: str, row: VersionRow, **details: Any) -> None:
    """Promote: make the channel point at ``row``, approved where that is required; a new channel is made.

    Does nothing where it points there already. ``details`` go into the audit log.

    Raises:
        BaseMismatch: if the channel points at a version of another base model.
        NotApproved: if too few people approved.
        RegistryError: if the name is malformed.
    """
    check_channel_name(channel)
    pointer = work.session.get(ChannelRow, channel, with_for_update=True)
    if pointer is not None and pointer.version_id == row.version_id:
        return
    _check_base(work.session, pointer, row)
    approved = check_approved(work.session, channel, row)
    if approved:
        details = {**details, "approved_by": approved}
    _move(work, channel, row, action="promote", below=None if pointer is None else pointer.move, **details)


def step_back(work: Transaction, pointer: ChannelRow, to: VersionRow | None) -> VersionRow:
    """Roll back: to the version before, or to an earlier one of this channel; needs no approval, for it had it.

    Raises:
        RegistryError: if there is no such move to go back to, or its version is gone.
    """
    moves = {row.sequence: row for row in work.session.scalars(select(MoveRow).where(MoveRow.channel == pointer.name))}
    current = moves[pointer.move or 0]
    target = _below(moves, current, to)
    if target is None:
        raise RegistryError(_nowhere(pointer, to))
    row = find(work.session, target.version_id)
    if row is None:
        raise RegistryError(
            f"channel {pointer.name!r} pointed at {target.version_id} before, which is gone from the registry (gc "
            f"removed it); name another version of its history with --to"
        )
    _check_base(work.session, pointer, row)
    _move(work, pointer.name, row, action="rollback", below=target.below)
    return row


def _below(moves: dict[int, MoveRow], current: MoveRow, to: VersionRow | None) -> MoveRow | None:
    """The move to go back to: the next one below, or the next one below of that version."""
    move = moves.get(current.below or 0)
    while move is not None and to is not None and move.version_id != to.version_id:
        move = moves.get(move.below or 0)
    return move


def _nowhere(pointer: ChannelRow, to: VersionRow | None) -> str:
    if to is None:
        return f"channel {pointer.name!r} has pointed at nothing else before; there is nothing to roll back to"
    if to.version_id == pointer.version_id:
        return f"channel {pointer.name!r} points at {to.version_id} already"
    return (
        f"channel {pointer.name!r} did not point at {to.version_id} before, so that going there is no rollback; "
        f"promote it"
    )


def _check_base(session: Session, pointer: ChannelRow | None, row: VersionRow) -> None:
    if pointer is None:
        return
    base = session.scalars(select(VersionRow.base_digest).where(VersionRow.version_id == pointer.version_id)).one()
    if base != row.base_digest:
        raise BaseMismatch(
            f"channel {pointer.name!r} serves base model {base}, version {row.version_id} belongs to "
            f"{row.base_digest}: devices on this channel could not load it; use another channel"
        )


def _move(work: Transaction, channel: str, row: VersionRow, *, action: str, below: int | None, **details: Any) -> None:
    made = MoveRow(
        channel=channel, version_id=row.version_id, action=action, actor=work.actor, moved_at=work.at, below=below
    )
    work.session.add(made)
    work.session.flush()
    pointer = work.session.get(ChannelRow, channel)
    before = None if pointer is None else pointer.version_id
    if pointer is None:
        work.session.add(ChannelRow(name=channel, version_id=row.version_id, moved_at=work.at, move=made.sequence))
    else:
        pointer.version_id, pointer.moved_at, pointer.move = row.version_id, work.at, made.sequence
    work.note(action, channel, version_id=row.version_id, before=before, **details)
