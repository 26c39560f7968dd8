"""Checking everything that is stored again: what cannot be trusted any more is named, and nothing is changed.

Each version's record and bytes against their digests, its lineage, each channel against the audit log, and the log
itself. Bytes that nothing refers to are no fault: gc takes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from federated.errors import RegistryError
from federated.registry.access import Access
from federated.registry.audit import verify_log
from federated.registry.records import Fault, record_of
from federated.registry.schema import AuditRow, ChannelRow, VersionRow

__all__ = ["faults_of"]

_ADDED = ("publish", "import")
_MOVED = ("promote", "rollback")


def faults_of(session: Session, access: Access) -> Iterator[Fault]:
    """Everything that is wrong, versions first."""
    rows = {row.version_id: row for row in session.scalars(select(VersionRow).order_by(VersionRow.sequence))}
    for row in rows.values():
        yield from _version_faults(row, access)
        yield from _lineage_faults(row, rows)
    broken = [Fault("", "audit", fault.message) for fault in verify_log(session)]
    yield from broken
    if not broken:  # else it says nothing
        yield from _log_faults(session, set(rows))


def _version_faults(row: VersionRow, access: Access) -> Iterator[Fault]:
    checks: dict[str, Callable[[], object]] = {
        "record": lambda: record_of(row),
        "weights": lambda: access.blobs.read(row.weights_digest),
        "training_state": lambda: access.blobs.read(row.state_digest) if row.state_digest else None,
    }
    for part, check in checks.items():
        try:
            with access.translated("verify a version"):
                check()
        except RegistryError as error:
            yield Fault(row.version_id, part, str(error))


def _lineage_faults(row: VersionRow, rows: dict[str, VersionRow]) -> Iterator[Fault]:
    if row.parent is None:
        return
    parent = rows.get(row.parent)
    if parent is None:
        yield Fault(row.version_id, "lineage", f"its parent {row.parent} is not in the registry; restore the database")
    elif parent.base_digest != row.base_digest:
        yield Fault(row.version_id, "lineage", f"its parent {row.parent} belongs to another base model")
    elif parent.sequence >= row.sequence:
        yield Fault(row.version_id, "lineage", f"its parent {row.parent} was published after it: no lineage has loops")


def _log_faults(session: Session, there: set[str]) -> Iterator[Fault]:
    """What the log says that there must be, against what there is."""
    replay = _Replay()
    for row in session.scalars(select(AuditRow).order_by(AuditRow.number).execution_options(yield_per=1000)):
        replay.take(row.action, row.subject, json.loads(row.details))
    for channel in session.scalars(select(ChannelRow).order_by(ChannelRow.name)):
        told = replay.channels.pop(channel.name, None)
        if told != channel.version_id:
            yield Fault(
                channel.version_id,
                "channel",
                f"channel {channel.name!r} points at {channel.version_id}, the audit log says {told or 'nothing'}: it "
                f"was moved from outside; promote or roll it back to where it belongs",
            )
    for name, version_id in sorted(replay.channels.items()):
        yield Fault(version_id, "channel", f"channel {name!r} is gone, the audit log says that it points there")
    for version_id in sorted(replay.versions - there):
        yield Fault(version_id, "record", "the audit log says that it was published, and its row is gone")
    for version_id in sorted(there - replay.versions):
        yield Fault(version_id, "record", "its row was put in from outside: the audit log does not know it")


class _Replay:
    """What the registry must hold after all that the log says."""

    def __init__(self) -> None:
        self.channels: dict[str, str] = {}
        self.versions: set[str] = set()

    def take(self, action: str, subject: str, details: dict[str, Any]) -> None:
        """One more row."""
        if action in _ADDED:
            self.versions.add(subject)
        elif action in _MOVED:
            self.channels[subject] = details["version_id"]
        elif action == "gc":
            self.versions -= set(details["versions"])
        elif action == "upgrade":
            self.channels = dict(details["channels"])
            self.versions = set(details["versions"])
