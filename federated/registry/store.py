"""The registry: publish immutable versions, find them by name, follow their lineage; the door to all the rest.

A version exists when its row is committed, and its row is committed after its blobs are on the disk: killing the
process at any moment loses no published version and shows none without its bytes. Nothing here trains, signs or
serves; `federated.flower` publishes, `federated.cli` and `federated.device` read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from federated.manifest import VersionManifest
from federated.registry.access import Access
from federated.registry.audit import AuditLog
from federated.registry.channel import Channel
from federated.registry.collect import YOUNG, Collection, collect
from federated.registry.devices import Devices
from federated.registry.evaluations import evaluate
from federated.registry.names import resolve
from federated.registry.opening import open_access
from federated.registry.portable import export_lineage, import_lineage
from federated.registry.publication import Publication
from federated.registry.reader import Reader
from federated.registry.records import Fault, VersionRecord
from federated.registry.tags import tag, untag
from federated.registry.verify import faults_of

__all__ = ["Registry"]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Registry(Reader):
    """A store of adapter versions; made by `open`, closed by `close` or a ``with`` block.

    Threads may share it: each call uses a database connection of its own. Several processes may open the same
    one; writers queue up.

    Attributes:
        audit: the log of all that was done.
        devices: what devices said that they hold.
    """

    def __init__(self, access: Access) -> None:
        super().__init__(access)
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

    def channel(self, name: str) -> Channel:
        """A channel in the hand, to move it, approve for it and look at its history; it need not be there yet."""
        return Channel(self._access, name)

    def evaluate(
        self, version: str, metrics: Mapping[str, float], *, run_id: str, not_protected: Sequence[str] = ()
    ) -> None:
        """Record that a version was measured on held-out examples; a manifest is made before that is known.

        Privacy: such numbers depend on clients' data, and no account covers them; ``not_protected`` says so.

        Args:
            version: a name as in `get`.
            metrics: plain finite numbers.
            run_id: where it was measured.
            not_protected: what no account covers here, in words; empty where nothing was promised.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            RegistryError: if a number is not finite.
        """
        with self._access.writing("record an evaluation") as work:
            row = resolve(work.session, version)
            evaluate(work, row, metrics, run_id=run_id, not_protected=not_protected)

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

    def export(self, name: str, folder: str | Path) -> list[VersionRecord]:
        """Write a version and its ancestors into a folder that another registry imports.

        Privacy: training states, which name clients, stay behind.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            RegistryError: if the folder holds something already or cannot be written.
            CorruptBlob: if bytes are damaged.
        """
        records = self.lineage(name)
        with self._access.translated("export a version"):
            export_lineage(records, self._access, Path(folder))
        return records

    def import_folder(self, folder: str | Path) -> list[VersionRecord]:
        """Publish what `export` wrote, all or nothing; what is there already stays as it is. Newest first.

        Raises:
            RegistryError: if it is no such folder, or something in it cannot be accepted.
            CorruptBlob: if bytes have another digest than their name.
            BaseMismatch: if a parent belongs to another base model.
        """
        with self._access.translated("import a folder"):
            versions = import_lineage(self._access, Path(folder))
        return self.lineage(versions[-1])

    def close(self) -> None:
        """Let go of the database; a second time does nothing."""
        self._access.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
