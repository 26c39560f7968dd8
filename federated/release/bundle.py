"""A bundle: the part of a repository from which a device installs one channel's current version without a network.

It is a folder of the same form, for a stick or a gateway. The repository's timestamp lasts for days; a bundle that is
to last longer gets one of its own, signed for that, and the repository goes on with a newer one. Until the bundle's
timestamp runs out, whoever has the bundle can show it to devices that were not online since: they would see no newer
version for so long. Devices that saw a newer one refuse it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from federated.errors import NotReleased, ReleaseError
from federated.release import shelf
from federated.release.disk import translated, write_file
from federated.release.edition import Edition
from federated.release.keys import KeyRing
from federated.release.records import ReleaseRecord
from federated.release.roles import SNAPSHOT, TARGETS, file_name
from federated.release.transfer import digest_of_target

__all__ = ["Bundle", "write_bundle"]


@dataclass(frozen=True)
class Bundle:
    """What was written.

    Args:
        folder: where.
        record: of the version that it installs.
        valid_until: until when a device takes it; UTC.
        nbytes: of all its files.
    """

    folder: Path
    record: ReleaseRecord
    valid_until: datetime
    nbytes: int


def write_bundle(
    edition: Edition, channel: str, source: Path, into: Path, *, ring: KeyRing, now: datetime, days: int
) -> Bundle:
    """See `federated.release.Publisher.bundle`."""
    record = shelf.current(edition, channel)
    if record is None:
        raise NotReleased(f"channel {channel} is empty: publish a version there first")
    shelf.require_allowed(edition, record)
    with translated("look at the bundle's folder"):
        if into.exists() and any(into.iterdir()):
            raise ReleaseError(f"{into} is not empty; choose a new folder for the bundle")
    signed = edition.signed(ring, now, days=days) if days else {}
    names = [*_targets(edition, channel, record), *_metadata(edition, channel)]
    until = min(_expiries(edition, channel))
    if days:
        edition.renew(SNAPSHOT)  # the bundle's own are in the bundle alone; the repository goes on with newer ones
        edition.commit(source, ring, now)
    with translated("write the bundle"):
        files = {name: signed.get(name) or (source / name).read_bytes() for name in names}
        for name, data in files.items():
            write_file(into / name, data)
    return Bundle(into, record, until, sum(map(len, files.values())))


def _targets(edition: Edition, channel: str, record: ReleaseRecord) -> list[str]:
    files = shelf.files_of(edition, channel, record).values()
    return [file_name(file.path, digest_of_target(file)) for file in files]


def _metadata(edition: Edition, channel: str) -> list[str]:
    """Roots that a device may lack first, the timestamp last."""
    roots = [f"{version}.root" for version in range(1, edition.root.version + 1)]
    parts = [f"{edition.role(name).version}.{name}" for name in (channel, TARGETS)]
    return [f"metadata/{name}.json" for name in (*roots, *parts, f"{edition.snapshot.version}.snapshot", "timestamp")]


def _expiries(edition: Edition, channel: str) -> list[datetime]:
    signed = (edition.root, edition.timestamp, edition.snapshot, edition.role(TARGETS), edition.role(channel))
    return [one.expires for one in signed]
