"""What comes out of the registry: a version's record, checked against its own id; and faults found by verifying.

Pure functions between rows and records; no queries here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from federated.errors import CorruptBlob, RegistryError
from federated.manifest import VersionManifest, canonical_json, digest_of, sha256_hex
from federated.registry.manifest_schema import check_plain
from federated.registry.schema import VersionRow

__all__ = ["Fault", "VersionRecord", "manifest_text", "record_of", "row_of"]

_LONGEST = 200
_COLUMNS = (
    "run_id",
    "round_number",
    "parent",
    "base_digest",
    "weights_digest",
    "adapter_id",
    "release_counter",
)


@dataclass(frozen=True)
class VersionRecord:
    """A published version.

    Args:
        version_id: digest of the manifest.
        number: the manifest's round_number: ``v3`` is round 3 of its run.
        manifest: the immutable record.
        created_at: when it was published, UTC.
        channels: names that point at it now, sorted.
        tags: names that stay at it, sorted.
    """

    version_id: str
    number: int
    manifest: VersionManifest
    created_at: datetime
    channels: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """One thing that `Registry.verify` found wrong.

    Args:
        version_id: the version it concerns.
        part: ``"record"``, ``"weights"`` or ``"training_state"``.
        message: what was found, what was expected and what to do.
    """

    version_id: str
    part: str
    message: str


def manifest_text(manifest: VersionManifest) -> str:
    """The manifest's canonical JSON, after checking that it can be stored and read back.

    Raises:
        RegistryError: if a field has a type, value or length that no record can hold.
    """
    _check_fields(manifest)
    try:
        text = canonical_json(manifest.to_dict()).decode()
        check_plain(json.loads(text))
        VersionManifest.from_dict(json.loads(text))
    except (TypeError, ValueError, KeyError) as error:
        raise RegistryError(f"the manifest cannot be stored as JSON: {error}; use plain finite values") from error
    return text


def _check_fields(manifest: VersionManifest) -> None:
    for name in ("run_id", "base_digest"):
        value = getattr(manifest, name)
        if not (isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable()):
            raise RegistryError(f"the manifest's {name} is {value!r}; expected 1 to {_LONGEST} printable characters")
    for name in ("round_number", "participants", "release_counter"):
        number = getattr(manifest, name)
        if type(number) is not int or not 0 <= number < 2**31:
            raise RegistryError(f"the manifest's {name} is {number!r}; expected an integer from 0 to 2147483647")
    if manifest.base and digest_of(manifest.base) != manifest.base_digest:
        raise RegistryError(
            f"the manifest's base has the digest {digest_of(manifest.base)}, its base_digest is "
            f"{manifest.base_digest}; they must be of one base model"
        )


def row_of(manifest: VersionManifest, text: str, *, state_digest: str | None, now: datetime) -> VersionRow:
    """A new row for ``text``, the manifest's canonical JSON, published at ``now`` (with its zone)."""
    return VersionRow(
        version_id=sha256_hex(text.encode()),
        run_id=manifest.run_id,
        round_number=manifest.round_number,
        parent=manifest.parent,
        base_digest=manifest.base_digest,
        weights_digest=manifest.weights_digest,
        state_digest=state_digest,
        manifest=text,
        created_at=now.astimezone(UTC).replace(tzinfo=None),
        adapter_id=manifest.adapter_id,
        release_counter=manifest.release_counter,
    )


def record_of(row: VersionRow, channels: Sequence[str] = (), tags: Sequence[str] = ()) -> VersionRecord:
    """The row's record, with the names that are at it.

    Raises:
        CorruptBlob: if the manifest does not have the digest that is its id, or a column contradicts it.
        RegistryError: if a newer library wrote the manifest.
    """
    text = str(row.manifest)
    found = sha256_hex(text.encode())
    if found != row.version_id:
        raise CorruptBlob(
            f"the record of version {row.version_id} was changed: its SHA-256 is {found}; restore the database"
        )
    manifest = _parsed(text, row.version_id)
    for name in _COLUMNS:
        if getattr(row, name) != getattr(manifest, name):
            raise CorruptBlob(
                f"the record of version {row.version_id} was changed: column {name} is {getattr(row, name)!r}, "
                f"its manifest says {getattr(manifest, name)!r}; restore the database"
            )
    created = row.created_at.replace(tzinfo=UTC)
    names = tuple(sorted(channels)), tuple(sorted(tags))
    return VersionRecord(row.version_id, manifest.round_number, manifest, created, *names)


def _parsed(text: str, version_id: str) -> VersionManifest:
    try:
        return VersionManifest.from_dict(json.loads(text))
    except (TypeError, ValueError, KeyError) as error:
        raise RegistryError(
            f"version {version_id} has a manifest that this library cannot read ({error}); upgrade federated-peft"
        ) from error
