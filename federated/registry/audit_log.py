"""The audit log inside a transaction: who did what to what, and when, each row chained to the one before.

A row's digest is of the canonical JSON of all its other fields, its number and the digest before it among them: the
last one, the head, stands for the whole history. A row is written in the transaction of what it records, so neither is
there without the other. `federated.registry.audit` reads the log and checks it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.orm import Session

from federated.errors import RegistryError
from federated.manifest import canonical_json, digest_of
from federated.registry.schema import AuditHeadRow, AuditRow

__all__ = ["FIRST", "AuditEntry", "append", "begin", "check_person", "entry_of", "head_of"]

FIRST = "0" * 64
"""What stands for the digest before the first row."""

_HEAD = 1
_LONGEST = 200


@dataclass(frozen=True)
class AuditEntry:
    """One row of the log.

    Args:
        number: from 1, without a gap.
        at: when, UTC, ISO 8601.
        actor: who, as they said: the log proves what was written, not who typed it.
        action: ``publish``, ``promote``, ``rollback``, ``approve``, ``require``, ``tag``, ``untag``, ``evaluate``,
            ``device``, ``gc``, ``import``, ``init`` or ``upgrade``; ``keys``, ``release``, ``revoke`` and ``rotate``
            are of signed releases.
        subject: what it was done to: a version's id, a channel, a tag, a device.
        details: canonical JSON.
        previous: digest of the row before.
        digest: of all the above.
    """

    number: int
    at: str
    actor: str
    action: str
    subject: str
    details: str
    previous: str
    digest: str

    def expected_digest(self) -> str:
        """What the digest is if nobody changed the row.

        Raises:
            ValueError, TypeError: if a field holds what no row can hold.
        """
        return digest_of({name: value for name, value in vars(self).items() if name != "digest"})


def entry_of(row: AuditRow) -> AuditEntry:
    """A row as plain data."""
    return AuditEntry(**{one.name: getattr(row, one.name) for one in fields(AuditEntry)})


def check_person(name: str, what: str) -> str:
    """A name as it is written into the log, without spaces around it.

    Raises:
        RegistryError: if it is empty, too long or not printable.
    """
    stripped = name.strip()
    if not (0 < len(stripped) <= _LONGEST and stripped.isprintable()):
        raise RegistryError(f"{what} {name!r}: expected 1 to {_LONGEST} printable characters")
    return stripped


def head_of(session: Session, *, lock: bool = False) -> AuditHeadRow:
    """The end of the log; locked until the transaction ends, where that is asked for.

    Raises:
        RegistryError: if somebody took it away.
    """
    head = session.get(AuditHeadRow, _HEAD, with_for_update=lock)
    if head is None:
        raise RegistryError("the audit log's head is gone: the database was changed from outside; restore a backup")
    return head


def append(
    session: Session, *, now: datetime, actor: str, action: str, subject: str, details: Mapping[str, Any]
) -> None:
    """Write one row behind the others; the caller's transaction holds the lock and commits."""
    head = head_of(session, lock=True)
    head.number, head.digest = _add(
        session, (head.number + 1, head.digest), now=now, actor=actor, action=action, subject=subject, details=details
    )


def begin(session: Session, *, now: datetime, actor: str, action: str, details: Mapping[str, Any]) -> None:
    """Write the first row: of a new registry, or of one that had no log yet. Does nothing where there is a log.

    The subject is a random name of the registry, so that no two logs share a digest.
    """
    if session.get(AuditHeadRow, _HEAD) is None:
        number, digest = _add(
            session, (1, FIRST), now=now, actor=actor, action=action, subject=secrets.token_hex(16), details=details
        )
        session.add(AuditHeadRow(id=_HEAD, number=number, digest=digest))


def _add(
    session: Session, place: tuple[int, str], *, now: datetime, details: Mapping[str, Any], **texts: str
) -> tuple[int, str]:
    number, previous = place
    at = now.astimezone(UTC).isoformat(timespec="microseconds")
    written = canonical_json(dict(details)).decode()
    body = AuditEntry(number, at, texts["actor"], texts["action"], texts["subject"], written, previous, "")
    digest = body.expected_digest()
    session.add(AuditRow(**{**vars(body), "digest": digest}))
    return number, digest
