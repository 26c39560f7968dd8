"""What devices said that they hold: who has which version, and since when.

A report is one row of the audit log; the table keeps the first and the last of each device and version, so that a
device that reports every hour does not fill it. What a device was ever reported to hold is kept by gc: it may roll back
to it, and somebody may ask what answered there.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import select

from federated.errors import RegistryError
from federated.registry.access import Access, utc
from federated.registry.audit_log import check_person
from federated.registry.names import resolve
from federated.registry.schema import DeviceRow

__all__ = ["Devices", "Holding"]


@dataclass(frozen=True)
class Holding:
    """That a device held a version.

    Args:
        device_id: its stable name.
        version_id: what it held.
        first_at: of its first report, UTC.
        last_at: of its last.
    """

    device_id: str
    version_id: str
    first_at: datetime
    last_at: datetime


class Devices:
    """The device reports of an open registry; `federated.registry.Registry.devices` is one."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def report(self, device_id: str, version: str, *, at: datetime) -> None:
        """Record that a device holds a version at a time; reports may come late and in any order.

        Args:
            device_id: its stable name.
            version: a name as in `Registry.get`.
            at: when it held it, with its zone.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            RegistryError: if the device's name is empty or not printable, or the time has no zone.
        """
        name = check_person(device_id, "the device's name")
        if at.tzinfo is None:
            raise RegistryError(f"the report of device {name!r} is of {at}, without a zone; expected one, such as UTC")
        with self._access.writing("record a device's report") as work:
            version_id = resolve(work.session, version).version_id
            row = work.session.get(DeviceRow, (name, version_id))
            if row is None:
                row = DeviceRow(device_id=name, version_id=version_id, first_at=utc(at), last_at=utc(at))
                work.session.add(row)
            row.first_at, row.last_at = min(row.first_at, utc(at)), max(row.last_at, utc(at))
            work.note("device", name, version_id=version_id, held_at=utc(at).isoformat())

    def holdings(self, device_id: str | None = None) -> list[Holding]:
        """What was reported, of all devices or of one, by device and then by time: the last one is what it holds."""
        query = select(DeviceRow).order_by(DeviceRow.device_id, DeviceRow.last_at, DeviceRow.first_at)
        if device_id is not None:
            query = query.where(DeviceRow.device_id == device_id)
        with self._access.reading("read device reports") as session:
            return [_holding(row) for row in session.scalars(query)]


def _holding(row: DeviceRow) -> Holding:
    first, last = row.first_at.replace(tzinfo=UTC), row.last_at.replace(tzinfo=UTC)
    return Holding(row.device_id, row.version_id, first, last)
