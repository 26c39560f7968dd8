"""The registry: publish immutable versions, find them by name, follow their lineage; the door to all the rest.

A version exists when its row is committed, and its row is committed after its blobs are on the disk: killing the
process at any moment loses no published version and shows none without its bytes. Nothing here trains, signs or
serves; `federated.flower` publishes, `federated.cli` and `federated.device` read.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from sqlalchemy import select

from federated.errors import BaseMismatch
from federated.manifest import VersionManifest
from federated.registry.access import Access
from federated.registry.audit import AuditLog
from federated.registry.channel import Channel, ChannelState, channel_states
from federated.registry.collect import YOUNG, Collection, collect
from federated.registry.devices import Devices
from federated.registry.difference import Difference, difference
from federated.registry.lookup import lineage_of, records_of, version_rows
from federated.registry.names import resolve
from federated.registry.opening import open_access
from federated.registry.publication import Publication
from federated.registry.records import Fault, VersionRecord
from federated.registry.schema import VersionRow
from federated.registry.tags import tag, tags_of, untag
from federated.registry.verify import faults_of

__all__ = ["Registry"]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Registry:
    """A store of adapter versions; made by `open`, closed by `close` or a ``with`` block.

    Threads may share it: each call uses a database connection of its own. Several processes may open the same
    one; writers queue up.

    Attributes:
        audit: the log of all that was done.
        devices: what devices said that they hold.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self.audit = AuditLog(access)
        self.devices = Devices(access)

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        create: bool = True,
        blobs: str | Path | None = None,
        clock: Callable[[], datetime] = _utc_now,
        actor: str = "unnamed",
    ) -> Self:
        """Open a registry and bring its schema up to date.

        On a disk without one free byte an existing registry opens for reading; writing raises `StorageFull`.

        Args:
            location: a folder (which holds ``registry.db`` and ``blobs/``), or an SQLAlchemy URL.
            create: make it if it is not there.
            blobs: where the bytes are: a folder, or any fsspec URL such as ``s3://bucket/prefix``; needed where
                ``location`` is a URL.
            clock: the time, with its zone.
            actor: who works with it, for the audit log.

        Raises:
            StorageFull: if there is no room for a new database.
            RegistryError: if it is not there, no database, of a newer schema, or in a folder that cannot be written.
        """
        return cls(open_access(location, create=create, blobs=blobs, clock=clock, actor=actor))

    @property
    def location(self) -> str:
        """The folder, or the URL without its password."""
        return self._access.place.label

    def publish(
        self,
        manifest: VersionManifest,
        weights: bytes,
        *,
        training_state: bytes | None = None,
        channel: str | None = None,
    ) -> str:
        """Publish a version, and move a channel to it in the same transaction.

        Publishing the same manifest again changes nothing but the channel, repairs damaged blobs and returns the
        same id.

        Args:
            manifest: the record; its parent must be published already and have the same base.
            weights: the adapter's canonical bytes, which ``manifest.weights_digest`` names.
            training_state: what the server needs to go on from here; never goes to a device.
            channel: moves to this version, wherever it points now.

        Returns:
            The version id, ``manifest.version_id``.

        Raises:
            RegistryError: if the bytes, the parent, the training state or the channel's name do not fit.
            BaseMismatch: if the parent or the channel belongs to another base model.
            NotApproved: if the channel requires approvals.
            StorageFull: if there is no room; everything published before is intact.
        """
        new, doing = Publication(manifest, weights, training_state, channel), "publish a version"
        with self._access.reading(doing) as session:
            new.check(session)  # refused before its bytes are moved
        with self._access.translated(doing, new.nbytes):
            new.store(self._access.blobs)
        with self._access.writing(doing, new.nbytes) as work:
            return new.carry_out(work)

    def get(self, name: str) -> VersionRecord:
        """One version's record.

        Args:
            name: ``latest``; ``v3`` (round 3 of the newest run; the newest of its kind) or ``RUN:v3``; a channel; a
                tag; a version id, or at least 6 characters of one.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            CorruptBlob: if the stored record does not match its id.
        """
        with self._access.reading("read a version") as session:
            return records_of(session, [resolve(session, name)])[0]

    def versions(self, run_id: str | None = None, *, newest: int | None = None) -> list[VersionRecord]:
        """All versions, or one run's, or the newest few, in the order of their publication.

        Raises:
            CorruptBlob: if a stored record does not match its id.
        """
        with self._access.reading("list versions") as session:
            return records_of(session, version_rows(session, run_id=run_id, newest=newest))

    def lineage(self, name: str = "latest") -> list[VersionRecord]:
        """A version and its ancestors, newest first.

        Raises:
            VersionNotFound: if no version, or more than one, matches ``name``.
            CorruptBlob: if a stored record does not match its id.
        """
        with self._access.reading("follow a lineage") as session:
            return records_of(session, lineage_of(session, resolve(session, name)))

    def weights(self, name: str) -> bytes:
        """The adapter's canonical bytes, hashed again.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            CorruptBlob: if the file is missing or does not match its digest.
        """
        record = self.get(name)
        with self._access.translated("read weights"):
            return self._access.blobs.read(record.manifest.weights_digest)

    def training_state(self, name: str) -> bytes | None:
        """The training state's bytes, hashed again; None where none was published.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            CorruptBlob: if the file is missing or does not match its digest.
        """
        with self._access.reading("read a training state") as session:
            digest = resolve(session, name).state_digest
            return None if digest is None else self._access.blobs.read(digest)

    def channel(self, name: str) -> Channel:
        """A channel in the hand, to move it, approve for it and look at its history; it need not be there yet."""
        return Channel(self._access, name)

    def channels(self) -> dict[str, str]:
        """Every channel's name and the version id that it points at, sorted by name."""
        return {one.name: one.version_id for one in self.channel_states() if one.version_id is not None}

    def channel_states(self) -> list[ChannelState]:
        """All channels with what they require, also those that point nowhere yet, sorted by name."""
        with self._access.reading("list channels") as session:
            return channel_states(session)

    def tags(self) -> dict[str, str]:
        """Every tag and the version id that it is at, sorted by name."""
        with self._access.reading("list tags") as session:
            return tags_of(session)

    def tag(self, version: str, name: str) -> None:
        """Give a version a name that stays, and keeps it from `gc`; the same again changes nothing.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            RegistryError: if the name is malformed, a channel's, or another version has it.
        """
        with self._access.writing("tag a version") as work:
            tag(work, resolve(work.session, version), name)

    def untag(self, name: str) -> None:
        """Take a tag away.

        Raises:
            RegistryError: if there is none of that name.
        """
        with self._access.writing("remove a tag") as work:
            untag(work, name)

    def require_base(self, base_digest: str) -> None:
        """Check that this registry is for a base model: it is empty, or has versions of it.

        Raises:
            BaseMismatch: naming the bases that it has.
        """
        with self._access.reading("look at base models") as session:
            bases = session.scalars(select(VersionRow.base_digest).distinct().order_by(VersionRow.base_digest)).all()
        if bases and base_digest not in bases:
            raise BaseMismatch(
                f"registry {self.location} holds versions of base model {', '.join(bases)}, not of {base_digest}; "
                f"use that base model, or another registry"
            )

    def verify(self) -> list[Fault]:
        """Check every record, blob, lineage, channel and the audit log again; an empty list is good news."""
        with self._access.reading("verify") as session:
            return list(faults_of(session, self._access))

    def gc(self, *, older_than: timedelta = YOUNG, keep: int = 1, dry_run: bool = False) -> Collection:
        """Remove versions that nothing needs, and bytes that no version names; see `federated.registry.collect`.

        Args:
            older_than: younger versions stay, for the sake of runs that are under way.
            keep: how many earlier versions of each channel's history stay for rollbacks.
            dry_run: change nothing, and say what would be removed.
        """
        return collect(self._access, older_than=older_than, keep=keep, dry_run=dry_run)

    def diff(self, first: str, second: str) -> Difference:
        """What two versions differ in: their records, and their tensors as they are stored.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            CorruptBlob: if a record or its bytes do not match their digest.
        """
        records = self.get(first), self.get(second)
        lines = self.lineage(records[0].version_id), self.lineage(records[1].version_id)
        weights = self.weights(records[0].version_id), self.weights(records[1].version_id)
        return difference(lines, weights)

    def close(self) -> None:
        """Let go of the database; a second time does nothing."""
        self._access.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
