"""What must hold before a version is published, and the one transaction that publishes it.

Blobs first, then the row: the order on which the registry's promise rests.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from federated.errors import BaseMismatch, RegistryError
from federated.manifest import VersionManifest, sha256_hex
from federated.registry.blobs import BlobStore
from federated.registry.channels import point
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

    def carry_out(self, session: Session, blobs: BlobStore, *, now: datetime) -> str:
        """Store the blobs, then the row, then the channel; returns the version id. The caller commits.

        Raises:
            RegistryError: if the parent, the training state or the channel's name does not fit.
            BaseMismatch: if the parent or the channel belongs to another base model.
            OSError: as the file system raises it.
        """
        text = manifest_text(self.manifest)
        row = _find(session, sha256_hex(text.encode()))
        if row is None:
            _check_parent(session, self.manifest)
        else:
            _check_state(row, self.training_state)
        blobs.put(self.weights)
        state_digest = None if self.training_state is None else blobs.put(self.training_state)
        if row is None:
            row = row_of(self.manifest, text, state_digest=state_digest, now=now)
            session.add(row)
            session.flush()
        if self.channel is not None:
            point(session, self.channel, row, now=now)
        return row.version_id


def _find(session: Session, version_id: str) -> VersionRow | None:
    return session.scalar(select(VersionRow).where(VersionRow.version_id == version_id))


def _check_parent(session: Session, manifest: VersionManifest) -> None:
    if manifest.parent is None:
        return
    parent = _find(session, manifest.parent)
    if parent is None:
        raise RegistryError(f"the parent version {manifest.parent} is not in this registry; publish it first")
    if parent.base_digest != manifest.base_digest:
        raise BaseMismatch(
            f"the parent version {manifest.parent} belongs to base model {parent.base_digest}, "
            f"this one to {manifest.base_digest}; start a new run without a parent"
        )


def _check_state(row: VersionRow, training_state: bytes | None) -> None:
    if training_state is not None and sha256_hex(training_state) != row.state_digest:
        raise RegistryError(
            f"version {row.version_id} is published already with another training state ({row.state_digest}); "
            f"versions are immutable: publish the same bytes, or leave them out"
        )
