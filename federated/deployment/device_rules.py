"""Steps within one transaction of the book of devices: who may use an invitation, and what names and keys are free.

Called by `federated.deployment.devices` alone, which begins and ends the transactions.
"""

from __future__ import annotations

import hmac
import sqlite3
from collections.abc import Sequence
from datetime import datetime

from federated.deployment.device_records import Claim, Device, KeysUsed, device_of, time_text
from federated.deployment.keys import fingerprint
from federated.errors import DeploymentError

__all__ = [
    "check_free",
    "current",
    "enter",
    "invitation_of",
    "keys_of",
    "not_to_approve",
    "note",
    "note_refusal",
    "refusal",
    "row_where",
    "rows_where",
    "unknown",
    "used_by",
    "withdraw",
]


def invitation_of(book: sqlite3.Connection, claim: Claim) -> sqlite3.Row | None:
    """The invitation of a token, looked for by name, and compared without telling how much of it was right."""
    rows = book.execute("SELECT * FROM invitations WHERE client_id = ?", (claim.client_id,)).fetchall()
    same = [row for row in rows if hmac.compare_digest(row["token_sha256"], claim.token_sha256)]
    return same[0] if same and same[0]["client_id"] == claim.client_id else None


def used_by(book: sqlite3.Connection, invitation: sqlite3.Row, claim: Claim) -> Device | None:
    """The entry that the invitation made, if it has the very keys of the claim: the answer may have been lost."""
    if invitation["used_by"] is None:
        return None
    entry = device_of(row_where(book, "number = ?", invitation["used_by"]))
    return entry if (entry.node_key, entry.update_key) == (claim.node_key, claim.update_key) else None


def refusal(invitation: sqlite3.Row | None, now: datetime) -> str:
    """Why an invitation cannot be used, for the operator; empty: it can."""
    if invitation is None:
        return "no invitation of this name has such a token"
    if invitation["used_at"] is not None:
        return f"its invitation was used at {invitation['used_at']}, by other keys"
    if invitation["withdrawn_at"] is not None:
        return f"its invitation was withdrawn at {invitation['withdrawn_at']}"
    if time_text(now) >= invitation["expires_at"]:
        return f"its invitation ended at {invitation['expires_at']}"
    return ""


def enter(book: sqlite3.Connection, claim: Claim, invitation: sqlite3.Row, *, at: str) -> Device:
    """Make the entry of a device, and use its invitation up.

    Raises:
        KeysUsed: if one of its keys is in the book.
    """
    held = rows_where(book, "node_key = ? OR update_key = ?", claim.node_key, claim.update_key)
    if held:
        raise KeysUsed(f"{claim.client_id}: a key of {device_of(held[0]).client_id}'s entry {held[0]['number']}")
    approved = bool(invitation["auto_approve"])
    state, approved_at = ("approved", at) if approved else ("pending", None)
    number = book.execute(
        "INSERT INTO devices (client_id, node_key, update_key, state, enrolled_at, approved_at) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (claim.client_id, claim.node_key, claim.update_key, state, at, approved_at),
    ).lastrowid
    book.execute("UPDATE invitations SET used_at = ?, used_by = ? WHERE number = ?", (at, number, invitation["number"]))
    entry = device_of(row_where(book, "number = ?", number))
    note(book, at, "door", "enrolled", claim.client_id, f"{keys_of(entry)}, from {claim.address}")
    if approved:
        note(book, at, "door", "approved", claim.client_id, "by its invitation")
    return entry


def note_refusal(book: sqlite3.Connection, claim: Claim, invitation: sqlite3.Row, detail: str, *, at: str) -> None:
    """Note that somebody has a token that opens nothing any more: once for each, so that nobody can fill the book."""
    if invitation["refused_at"] is None:
        book.execute("UPDATE invitations SET refused_at = ? WHERE number = ?", (at, invitation["number"]))
        note(book, at, "door", "refused", claim.client_id, detail)


def withdraw(book: sqlite3.Connection, client_id: str, *, at: str, actor: str, reason: str = "a newer one") -> bool:
    """End the invitation of a name that can still be used; whether there was one."""
    done = book.execute(
        "UPDATE invitations SET withdrawn_at = ? WHERE client_id = ? AND used_at IS NULL AND withdrawn_at IS NULL "
        "AND expires_at > ?",
        (at, client_id, at),
    ).rowcount
    if done:
        note(book, at, actor, "withdrew the invitation", client_id, reason)
    return bool(done)


def check_free(book: sqlite3.Connection, client_id: str) -> None:
    """See that a name can be invited.

    Raises:
        DeploymentError: if such a device is enrolled, or the name is known in another spelling.
    """
    entry = current(book, client_id)
    if entry is not None and entry.state != "revoked":
        raise DeploymentError(f"{client_id} is enrolled ({entry.state}); revoke it first, or choose another name")
    for table in ("devices", "invitations"):
        for row in book.execute(f"SELECT client_id FROM {table} WHERE client_id = ?", (client_id,)):  # noqa: S608
            if row["client_id"] != client_id:
                raise DeploymentError(f"{client_id} is known as {row['client_id']}; names differ by more than case")


def not_to_approve(book: sqlite3.Connection, client_id: str, entry: Device | None) -> str:
    """Why a name cannot be approved."""
    if entry is not None:
        return f"{client_id} was revoked at {entry.revoked_at} ({entry.remark}); invite it again, with new keys"
    waiting = book.execute("SELECT 1 FROM invitations WHERE client_id = ?", (client_id,)).fetchone()
    if waiting:
        return f"{client_id} has not used its invitation yet; approve it once the device has asked"
    return unknown(book, client_id)


def unknown(book: sqlite3.Connection, client_id: str) -> str:
    """That there is no such device, and which there are."""
    names = [row["client_id"] for row in book.execute("SELECT DISTINCT client_id FROM devices ORDER BY client_id")]
    known = ", ".join([*names[:10], *(["..."] if len(names) > 10 else [])]) or "none"
    return f"no device is called {client_id[:80]!a}; known are: {known}"


def current(book: sqlite3.Connection, client_id: str) -> Device | None:
    """The newest entry of a name."""
    rows = rows_where(book, "client_id = ? ORDER BY number DESC LIMIT 1", client_id)
    return device_of(rows[0]) if rows else None


def row_where(book: sqlite3.Connection, where: str, *values: object) -> sqlite3.Row:
    """The entry that must be there."""
    return rows_where(book, where, *values)[0]


def rows_where(book: sqlite3.Connection, where: str, *values: object) -> Sequence[sqlite3.Row]:
    """Entries; ``where`` is text of this room alone, and what comes from elsewhere is in ``values``."""
    return book.execute(f"SELECT * FROM devices WHERE {where}", values).fetchall()  # noqa: S608


def keys_of(entry: Device) -> str:
    """An entry's keys for the log."""
    return f"node {fingerprint(entry.node_key)}, updates {fingerprint(entry.update_key)}"


def note(book: sqlite3.Connection, at: str, actor: str, action: str, client_id: str, detail: str) -> None:
    """Add a line to the log."""
    book.execute(
        "INSERT INTO log (at, actor, action, client_id, detail) VALUES (?, ?, ?, ?, ?)",
        (at, actor[:200], action, client_id, detail),
    )
