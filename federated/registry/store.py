"""The registry: publish immutable versions, find them by name, follow their lineage, move channels.

A version exists when its row is committed, and its row is committed after its blobs are on the disk: killing the
process at any moment loses no published version and shows none without its bytes. Nothing here trains, signs or
serves; `federated.flower` publishes, `federated.cli` and `federated.device` read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from federated.errors import BaseMismatch, RegistryError, StorageFull
from federated.manifest import VersionManifest
from federated.registry.blobs import BlobStore
from federated.registry.channels import compare, point
from federated.registry.database import Place, locate, open_engine, open_frozen, prepare, writing
from federated.registry.names import resolve
from federated.registry.publication import Publication
from federated.registry.records import Fault, VersionRecord, record_of
from federated.registry.schema import ChannelRow, VersionRow
from federated.registry.translate import translated
from federated.registry.upgrades import upgrade

__all__ = ["Registry"]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Registry:
    """A store of adapter versions; made by `open`, closed by `close` or a ``with`` block.

    Threads may share it: each call uses a database connection of its own. Several processes may open the same
    one; writers queue up.
    """

    def __init__(self, place: Place, engine: Engine, *, clock: Callable[[], datetime]) -> None:
        self._place = place
        self._blobs = BlobStore(place.blobs)
        self._engine: Engine | None = engine
        self._clock = clock

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        create: bool = True,
        blobs: str | Path | None = None,
        clock: Callable[[], datetime] = _utc_now,
    ) -> Self:
        """Open a registry and bring its schema up to date.

        On a disk without one free byte an existing registry opens for reading; writing raises `StorageFull`.

        Args:
            location: a folder (which holds ``registry.db`` and ``blobs/``), or an SQLAlchemy URL.
            create: make it if it is not there.
            blobs: folder of the blobs; needed with a URL.
            clock: the time, with its zone, for ``created_at``.

        Raises:
            StorageFull: if there is no room for a new database.
            RegistryError: if it is not there, no database, of a newer schema, or in a folder that cannot be written.
        """
        given = Path(blobs or ".") if "://" in str(location) else Path(location)
        with translated("open the registry", str(given), folder=given.absolute()):
            place = locate(location, blobs)
        try:
            with translated("open the registry", place.label, folder=place.blobs):
                prepare(place, create=create)
                BlobStore(place.blobs).sweep()
                engine = _upgraded(open_engine(place), place, create=create)
        except StorageFull:
            frozen = open_frozen(place)
            if frozen is None:
                raise
            with translated("open the registry", place.label, folder=place.blobs):
                engine = _upgraded(frozen, place, create=False)
        return cls(place, engine, clock=clock)

    @property
    def location(self) -> str:
        """The folder, or the URL without its password."""
        return self._place.label

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
            StorageFull: if there is no room; everything published before is intact.
        """
        new = Publication(manifest, weights, training_state, channel)
        with self._writing("publish a version", new.nbytes) as session:
            return new.carry_out(session, self._blobs, now=self._clock())

    def get(self, name: str) -> VersionRecord:
        """One version's record.

        Args:
            name: ``latest``; ``v3`` (round 3 of the newest run; the newest of its kind) or ``RUN:v3``; a channel;
                a version id, or at least 6 characters of one.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            CorruptBlob: if the stored record does not match its id.
        """
        with self._reading("read a version") as session:
            return _records(session, [resolve(session, name)])[0]

    def versions(self, run_id: str | None = None) -> list[VersionRecord]:
        """All versions, or one run's, in the order of their publication.

        Raises:
            CorruptBlob: if a stored record does not match its id.
        """
        query = select(VersionRow).order_by(VersionRow.sequence)
        if run_id is not None:
            query = query.where(VersionRow.run_id == run_id)
        with self._reading("list versions") as session:
            return _records(session, session.scalars(query))

    def lineage(self, name: str = "latest") -> list[VersionRecord]:
        """A version and its ancestors, newest first.

        Raises:
            VersionNotFound: if no version, or more than one, matches ``name``.
            CorruptBlob: if a stored record does not match its id.
        """
        with self._reading("follow a lineage") as session:
            rows = {row.version_id: row for row in session.scalars(select(VersionRow))}
            row = rows.pop(resolve(session, name).version_id, None)
            line = []
            while row is not None:
                line.append(row)
                row = rows.pop(row.parent or "", None)
            return _records(session, line)

    def weights(self, name: str) -> bytes:
        """The adapter's canonical bytes, hashed again.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            CorruptBlob: if the file is missing or does not match its digest.
        """
        record = self.get(name)
        with self._translated("read weights"):
            return self._blobs.read(record.manifest.weights_digest)

    def training_state(self, name: str) -> bytes | None:
        """The training state's bytes, hashed again; None where none was published.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
            CorruptBlob: if the file is missing or does not match its digest.
        """
        with self._reading("read a training state") as session:
            digest = resolve(session, name).state_digest
            return None if digest is None else self._blobs.read(digest)

    def channels(self) -> dict[str, str]:
        """Every channel's name and the version id that it points at, sorted by name."""
        with self._reading("list channels") as session:
            rows = session.scalars(select(ChannelRow).order_by(ChannelRow.name))
            return {row.name: row.version_id for row in rows}

    def move_channel(self, channel: str, name: str, *, expected: str | None) -> VersionRecord:
        """Move a channel by compare-and-set; moving it back to an older version is a rollback.

        Args:
            channel: ``[a-z0-9-]+``.
            name: the version, as in `get`.
            expected: version id that the channel points at now; None if it must not exist yet.

        Returns:
            The version that it points at now.

        Raises:
            ChannelConflict: if it points elsewhere.
            BaseMismatch: if it points at a version of another base model.
            VersionNotFound: if no version, or more than one, matches ``name``.
        """
        with self._writing("move a channel") as session:
            row = resolve(session, name)
            compare(session, channel, expected)
            point(session, channel, row, now=self._clock())
            session.flush()
            return _records(session, [row])[0]

    def require_base(self, base_digest: str) -> None:
        """Check that this registry is for a base model: it is empty, or has versions of it.

        Raises:
            BaseMismatch: naming the bases that it has.
        """
        with self._reading("look at base models") as session:
            bases = session.scalars(select(VersionRow.base_digest).distinct().order_by(VersionRow.base_digest)).all()
        if bases and base_digest not in bases:
            raise BaseMismatch(
                f"registry {self.location} holds versions of base model {', '.join(bases)}, not of {base_digest}; "
                f"use that base model, or another registry"
            )

    def verify(self) -> list[Fault]:
        """Check every record and every blob again; an empty list is good news."""
        with self._reading("verify") as session:
            return [fault for row in session.scalars(select(VersionRow)) for fault in self._faults(row)]

    def close(self) -> None:
        """Let go of the database; a second time does nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            with self._translated("close the registry"):
                engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _faults(self, row: VersionRow) -> Iterator[Fault]:
        checks: dict[str, Callable[[], object]] = {
            "record": lambda: record_of(row, ()),
            "weights": lambda: self._blobs.read(row.weights_digest),
            "training_state": lambda: self._blobs.read(row.state_digest) if row.state_digest else None,
        }
        for part, check in checks.items():
            try:
                with self._translated("verify a version"):
                    check()
            except RegistryError as error:
                yield Fault(row.version_id, part, str(error))

    @contextmanager
    def _translated(self, doing: str, needed: int = 0) -> Iterator[None]:
        with translated(doing, self.location, folder=self._place.blobs, needed=needed):
            yield

    @contextmanager
    def _reading(self, doing: str) -> Iterator[Session]:
        with self._translated(doing), Session(self._opened()) as session:
            yield session

    @contextmanager
    def _writing(self, doing: str, needed: int = 0) -> Iterator[Session]:
        bind = writing(self._opened())
        with self._translated(doing, needed), Session(bind, expire_on_commit=False) as session, session.begin():
            yield session

    def _opened(self) -> Engine:
        if self._engine is None:
            raise RegistryError(f"registry {self.location} is closed; open it again")
        return self._engine


def _upgraded(engine: Engine, place: Place, *, create: bool) -> Engine:
    try:
        upgrade(engine, create=create, label=place.label)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _records(session: Session, rows: Iterable[VersionRow]) -> list[VersionRecord]:
    pointing: defaultdict[str, list[str]] = defaultdict(list)
    for channel in session.scalars(select(ChannelRow)):
        pointing[channel.version_id].append(channel.name)
    return [record_of(row, pointing[row.version_id]) for row in rows]
