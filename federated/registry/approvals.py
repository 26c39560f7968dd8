"""Approvals inside a transaction: a channel may ask that several people approve a version before it moves there.

A name is what somebody typed: who can write to the database can type any. What makes the same person count twice
harder is only that capitals and spaces do not count; what makes it visible is the audit log.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from federated.errors import NotApproved, RegistryError
from federated.registry.access import Transaction
from federated.registry.audit_log import check_person
from federated.registry.schema import ApprovalRow, PolicyRow, VersionRow

__all__ = ["approve", "approvers", "check_approved", "require", "required"]

_MOST = 100


def required(session: Session, channel: str) -> int:
    """How many people must approve; 0 where nobody said."""
    row = session.get(PolicyRow, channel)
    return 0 if row is None else row.approvals


def approvers(session: Session, channel: str, version_id: str) -> list[str]:
    """Who approved a version for a channel, in that order."""
    query = select(ApprovalRow.name).where(ApprovalRow.version_id == version_id, ApprovalRow.channel == channel)
    return list(session.scalars(query.order_by(ApprovalRow.sequence)))


def require(work: Transaction, channel: str, approvals: int) -> None:
    """Ask for so many approvals from now on; where the channel points now stays.

    Raises:
        RegistryError: if the number makes no sense, or runs move the channel by themselves.
    """
    if not 0 <= approvals <= _MOST:
        raise RegistryError(f"a channel cannot require {approvals} approvals; expected 0 to {_MOST}")
    if channel == "dev" and approvals:
        raise RegistryError(
            "channel 'dev' cannot require approvals: runs move it by themselves, and would fail; require them of the "
            "channel that devices follow, such as stable"
        )
    row = work.session.get(PolicyRow, channel, with_for_update=True)
    before = 0 if row is None else row.approvals
    if row is None:
        work.session.add(PolicyRow(channel=channel, approvals=approvals))
    else:
        row.approvals = approvals
    work.note("require", channel, approvals=approvals, before=before)


def approve(work: Transaction, channel: str, row: VersionRow, name: str) -> None:
    """Note that somebody approves; a second time changes nothing.

    Raises:
        RegistryError: if the name is empty, too long or not printable.
    """
    shown = check_person(name, "the name of who approves")
    person = " ".join(shown.casefold().split())
    same = select(ApprovalRow).where(
        ApprovalRow.version_id == row.version_id, ApprovalRow.channel == channel, ApprovalRow.person == person
    )
    if work.session.scalar(same) is not None:
        return
    work.session.add(
        ApprovalRow(version_id=row.version_id, channel=channel, person=person, name=shown, approved_at=work.at)
    )
    work.note("approve", row.version_id, channel=channel, name=shown)


def check_approved(session: Session, channel: str, row: VersionRow) -> list[str]:
    """Who approved, if they are enough; empty where none need to.

    Raises:
        NotApproved: naming those who did.
    """
    needed = required(session, channel)
    if not needed:
        return []
    found = approvers(session, channel, row.version_id)
    if len(found) < needed:
        raise NotApproved(
            f"channel {channel!r} requires {needed} approvals, version {row.version_id} has {len(found)}"
            f" ({', '.join(found) or 'nobody yet'}); somebody else approves it with: "
            f"fedpeft approve {row.version_id[:12]} --for {channel} --as NAME"
        )
    return found
