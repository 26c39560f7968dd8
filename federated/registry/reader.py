"""What can be read from a registry; `federated.registry.Registry` adds what changes it."""

from __future__ import annotations

from sqlalchemy import select

from federated.errors import BaseMismatch
from federated.registry.access import Access
from federated.registry.channel import ChannelState, channel_states
from federated.registry.difference import Difference, difference
from federated.registry.evaluations import EvaluationRecord, evaluations_of
from federated.registry.lookup import lineage_of, next_counter, records_of, version_rows
from federated.registry.names import resolve
from federated.registry.records import VersionRecord
from federated.registry.schema import VersionRow
from federated.registry.tags import tags_of

__all__ = ["Reader"]


class Reader:
    """Versions by name, their lineages, bytes, channels and tags.

    Args:
        access: the open registry's.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    @property
    def location(self) -> str:
        """The folder, or the URL without its password."""
        return self._access.place.label

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

    def next_counter(self, adapter_id: str) -> int:
        """A release counter larger than those of all versions of an adapter.

        Two runs of one adapter that publish at the same moment may be given the same; along a lineage counters grow.
        """
        with self._access.reading("count releases") as session:
            return next_counter(session, adapter_id)

    def evaluations(self, name: str) -> list[EvaluationRecord]:
        """What was measured of a version after it was published, newest first.

        Raises:
            VersionNotFound: if no version, or more than one, matches.
        """
        with self._access.reading("read evaluations") as session:
            return evaluations_of(session, resolve(session, name).version_id)

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
