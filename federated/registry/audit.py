"""Reading the audit log, and checking that nobody tampered with it.

What the chain shows by itself: a row that was edited, taken out, put in or moved, by its number. Who can write to the
database can also make the whole chain anew, or cut rows off its end together with the head: that shows against a head
that was kept elsewhere (`AuditLog.head`; a release carries it), and nothing here can show it without one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from federated.errors import RegistryError
from federated.manifest import canonical_json
from federated.registry.access import Access
from federated.registry.audit_log import FIRST, AuditEntry, entry_of, head_of
from federated.registry.schema import AuditHeadRow, AuditRow

__all__ = ["OUTSIDE", "AuditFault", "AuditHead", "AuditLog", "check_chain", "verify_log"]

OUTSIDE = ("keys", "release", "revoke", "rotate")
"""Actions that happen elsewhere: to a repository of signed releases and its keys."""

_HEAD = re.compile(r"(?P<number>[0-9]{1,18}):(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True)
class AuditHead:
    """Where a log ends: it stands for all rows up to there. As text ``NUMBER:DIGEST``."""

    number: int
    digest: str

    def __str__(self) -> str:
        return f"{self.number}:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            RegistryError: if it is none.
        """
        found = _HEAD.fullmatch(text.strip())
        if found is None:
            raise RegistryError(
                f"{text!r} is no head of an audit log; expected NUMBER:DIGEST, as `audit log` prints it"
            )
        return cls(int(found["number"]), found["digest"])


@dataclass(frozen=True)
class AuditFault:
    """One place where the log is not what was written.

    Args:
        number: of the row.
        message: what was found there.
    """

    number: int
    message: str


class AuditLog:
    """The log of an open registry; `federated.registry.Registry.audit` is one."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def head(self) -> AuditHead:
        """Where the log ends now; keep it elsewhere, and `verify` can show what was cut off since."""
        with self._access.reading("read the audit log") as session:
            row = head_of(session)
            return AuditHead(row.number, row.digest)

    def entries(self, newest: int | None = None) -> list[AuditEntry]:
        """The rows in order, or the newest few of them."""
        query = select(AuditRow).order_by(AuditRow.number.desc()).limit(newest)
        with self._access.reading("read the audit log") as session:
            return [entry_of(row) for row in session.scalars(query)][::-1]

    def note(self, action: str, subject: str, **details: Any) -> None:
        """Write down what was done outside of the registry, such as a release or a new key.

        Args:
            action: one of `OUTSIDE`; the registry's own are written by what they record.
            subject: what it was done to.
            details: plain data.

        Raises:
            RegistryError: if it is another action, or the details are not plain.
        """
        if action not in OUTSIDE:
            raise RegistryError(f"{action!r} cannot be noted from outside; expected one of {', '.join(OUTSIDE)}")
        try:
            canonical_json(details)
        except (TypeError, ValueError) as error:
            raise RegistryError(f"the audit log cannot hold these details: {error}; use plain finite values") from error
        with self._access.writing("write the audit log") as work:
            work.note(action, subject, **details)

    def verify(self, head: AuditHead | None = None) -> list[AuditFault]:
        """Check every row; an empty list is good news.

        Args:
            head: as it was kept elsewhere; the log must hold it.
        """
        with self._access.reading("verify the audit log") as session:
            return verify_log(session, head)


def verify_log(session: Session, head: AuditHead | None = None) -> list[AuditFault]:
    """`AuditLog.verify` in the caller's session."""
    rows = session.scalars(select(AuditRow).order_by(AuditRow.number).execution_options(yield_per=1000))
    kept = session.get(AuditHeadRow, 1)
    own = None if kept is None else AuditHead(kept.number, kept.digest)
    return list(check_chain(map(entry_of, rows), own=own, head=head))


def check_chain(
    entries: Iterable[AuditEntry], *, own: AuditHead | None, head: AuditHead | None = None
) -> Iterator[AuditFault]:
    """Walk the chain and name each row at which it does not hold.

    Args:
        entries: by number.
        own: the head that the database keeps; None if it is gone.
        head: one that was kept elsewhere.
    """
    last, digest, at_head = 0, FIRST, None
    for entry in entries:
        yield from _gap(last, entry.number)
        fault = _check(entry, digest if entry.number == last + 1 else None)
        if fault is not None:
            yield fault
        last, digest = entry.number, entry.digest
        if head is not None and entry.number == head.number:
            at_head = entry.digest
    yield from _check_own(AuditHead(last, digest), own)
    if head is not None:
        yield from _check_kept(last, at_head, head)


def _gap(last: int, number: int) -> Iterator[AuditFault]:
    if number > last + 1:
        found = f"row {last + 1} is" if number == last + 2 else f"rows {last + 1} to {number - 1} are"
        yield AuditFault(last + 1, f"{found} missing: row {number} follows row {last}")


def _check(entry: AuditEntry, before: str | None) -> AuditFault | None:
    """One row: what it says against its own digest, then against the row before, where that is there."""
    number = entry.number
    try:
        expected = entry.expected_digest()
    except (ValueError, TypeError) as error:
        return AuditFault(number, f"row {number} was edited: it holds what no row can ({error})")
    if expected != entry.digest:
        return AuditFault(
            number, f"row {number} was edited: what it says has the digest {expected}, written is {entry.digest}"
        )
    if before is not None and entry.previous != before and number == 1:
        return AuditFault(1, f"row 1 follows {entry.previous}, and it is the first: the rows before it were cut off")
    if before is not None and entry.previous != before:
        return AuditFault(
            number - 1,
            f"row {number - 1} is not the one that row {number} follows (digest {before}, expected {entry.previous}): "
            f"it was replaced, put in or moved",
        )
    return None


def _check_own(end: AuditHead, own: AuditHead | None) -> Iterator[AuditFault]:
    if own is None:
        yield AuditFault(end.number, "the head of the log is gone from the database")
    elif own.number > end.number:
        yield AuditFault(
            end.number + 1, f"the log ends at row {end.number}, its head names row {own.number}: rows were cut off"
        )
    elif own.number < end.number:
        yield AuditFault(own.number + 1, f"row {own.number + 1} is beyond the log's head: it was put in")
    elif own.digest != end.digest:
        yield AuditFault(end.number, f"row {end.number} is not the one that the log's head names: it was replaced")


def _check_kept(last: int, found: str | None, head: AuditHead) -> Iterator[AuditFault]:
    if head.number > last:
        yield AuditFault(last + 1, f"the log ends at row {last}, the head kept elsewhere is row {head.number}: cut off")
    elif found != head.digest:
        yield AuditFault(
            head.number,
            f"row {head.number} has the digest {found or 'of no row'}, the head kept elsewhere {head.digest}: "
            f"the history up to it was written anew",
        )
