"""What must hold before a version is published, and how it is published.

Bytes first, then the row: the order on which the registry's promise rests. Bytes are stored before the transaction, so
that a slow upload holds nobody up, and looked for once more inside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy.orm import Session

from federated.errors import BaseMismatch, RegistryError
from federated.manifest import VersionManifest, sha256_hex
from federated.registry.access import Transaction
from federated.registry.blobs import Blobs
from federated.registry.channels import point
from federated.registry.names import find
from federated.registry.records import manifest_text, row_of
from federated.registry.schema import VersionRow

__all__ = ["Publication"]


@dataclass(frozen=True)
class Publication:
    """One version on its way in; see `Registry.publish` for the fields.

    Raises:
        RegistryError: if the manifest cannot be stored, or the weights are not those that it names.
    """

    manifest: VersionManifest
    weights: bytes
    training_state: bytes | None = None
    channel: str | None = None

    def __post_init__(self) -> None:
        found = sha256_hex(self.weights)
        if found != self.manifest.weights_digest:
            raise RegistryError(
                f"the weights' SHA-256 is {found}, the manifest says {self.manifest.weights_digest}; "
                f"publish the bytes that the manifest was made from"
            )

    @property
    def nbytes(self) -> int:
        """Size of the blobs in bytes."""
        return len(self.weights) + len(self.training_state or b"")

    def check(self, session: Session) -> VersionRow | None:
        """What must hold of the database; returns the version's row if it is published already.

        Raises:
            RegistryError: if the parent or the training state does not fit.
            BaseMismatch: if the parent belongs to another base model.
        """
        row = find(session, self.version_id)
        if row is None:
            _check_parent(session, self.manifest)
        else:
            _check_state(row, self.training_state)
        return row

    def store(self, blobs: Blobs) -> None:
        """Put the bytes where they belong; without a row they mean nothing yet.

        Raises:
            OSError: as the file system raises it.
        """
        for data in self._bytes:
            blobs.put(data)

    def carry_out(self, work: Transaction, *, action: str = "publish", **details: Any) -> str:
        """Add the row, then move the channel; returns the version id. The bytes were stored before.

        Raises:
            RegistryError: see `check`; or the channel's name does not fit.
            BaseMismatch: if the parent or the channel belongs to another base model.
            NotApproved: if the channel requires approvals.
            OSError: as the file system raises it.
        """
        row = self.check(work.session)
        for data in self._bytes:
            if not work.blobs.has(sha256_hex(data)):  # gc found them without a row, just before
                work.blobs.put(data)
        if row is None:
            row = row_of(self.manifest, self._text, state_digest=self._state_digest, now=work.now)
            work.session.add(row)
            work.session.flush()
            work.note(action, row.version_id, **self._told(), **details)
        if self.channel is not None:
            point(work, self.channel, row)
        return row.version_id

    @cached_property
    def version_id(self) -> str:
        """The id that it will have."""
        return sha256_hex(self._text.encode())

    @cached_property
    def _text(self) -> str:
        return manifest_text(self.manifest)

    @property
    def _bytes(self) -> tuple[bytes, ...]:
        return (self.weights,) if self.training_state is None else (self.weights, self.training_state)

    @property
    def _state_digest(self) -> str | None:
        return None if self.training_state is None else sha256_hex(self.training_state)

    def _told(self) -> dict[str, Any]:
        """What the audit log says besides the id; the training state's digest is in no manifest."""
        one = self.manifest
        return {"run_id": one.run_id, "round_number": one.round_number, "state_digest": self._state_digest}


def _check_parent(session: Session, manifest: VersionManifest) -> None:
    if manifest.parent is None:
        return
    parent = find(session, manifest.parent)
    if parent is None:
        raise RegistryError(f"the parent version {manifest.parent} is not in this registry; publish it first")
    if parent.base_digest != manifest.base_digest:
        raise BaseMismatch(
            f"the parent version {manifest.parent} belongs to base model {parent.base_digest}, "
            f"this one to {manifest.base_digest}; start a new run without a parent"
        )
    if manifest.release_counter and manifest.release_counter <= parent.release_counter:
        raise RegistryError(
            f"the release counter is {manifest.release_counter}, the parent version's {parent.release_counter}; "
            f"it must grow along a lineage: take Registry.next_counter"
        )


def _check_state(row: VersionRow, training_state: bytes | None) -> None:
    if training_state is not None and sha256_hex(training_state) != row.state_digest:
        raise RegistryError(
            f"version {row.version_id} is published already with another training state ({row.state_digest}); "
            f"versions are immutable: publish the same bytes, or leave them out"
        )
