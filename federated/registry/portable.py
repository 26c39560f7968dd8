"""A version with its lineage as a folder that travels by any means, and back into a registry.

    FOLDER/
      lineage.json                  format, and the versions' ids, oldest first
      manifests/VERSION_ID.json     each record's canonical JSON: its SHA-256 is its name
      weights/WEIGHTS_DIGEST.safetensors

Nothing in it is signed, and nothing in it is secret from devices: training states, which say who took part, stay
behind.
Names of files are never taken from a file's contents but by checked digests, so a folder from afar can name no other
place; every byte is hashed, and every adapter decoded, before anything is imported. One import is one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federated.errors import CorruptBlob, RegistryError, WireError
from federated.manifest import VersionManifest, canonical_json, sha256_hex
from federated.registry.blobs import is_digest
from federated.registry.publication import Publication
from federated.registry.records import VersionRecord, manifest_text
from federated.wire import decode_tensors

if TYPE_CHECKING:
    from federated.registry.access import Access

__all__ = ["FORMAT", "export_lineage", "import_lineage"]

FORMAT = "federated-peft lineage 1"
"""What ``lineage.json`` says that it is."""

_INDEX = "lineage.json"


def export_lineage(records: Sequence[VersionRecord], access: Access, folder: Path) -> None:
    """Write a version and its ancestors into a new folder; see `Registry.export`.

    Args:
        records: newest first.
        access: where the bytes are.
        folder: must not be there yet, or be empty; ``lineage.json`` is written last, so half a folder is none.

    Raises:
        RegistryError: if the folder holds something already.
        CorruptBlob: if bytes are damaged.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RegistryError(f"{folder} is there and not an empty folder; export into a new one")
    (folder / "manifests").mkdir(parents=True)
    (folder / "weights").mkdir()
    for record in records:
        text, digest = manifest_text(record.manifest), record.manifest.weights_digest
        (folder / "manifests" / f"{record.version_id}.json").write_text(text, encoding="utf-8")
        (folder / "weights" / f"{digest}.safetensors").write_bytes(access.blobs.read(digest))
    versions = [record.version_id for record in reversed(records)]
    (folder / _INDEX).write_bytes(canonical_json({"format": FORMAT, "versions": versions}))


def import_lineage(access: Access, folder: Path) -> list[str]:
    """Publish what a folder holds, all or nothing; versions that are there already stay as they are.

    Returns:
        The versions' ids, oldest first.

    Raises:
        RegistryError: if the folder is no lineage, or a record or an adapter in it cannot be accepted.
        CorruptBlob: if bytes have another digest than their name.
        BaseMismatch: if a parent belongs to another base model.
    """
    ids = _index(folder / _INDEX)
    new = [_publication(folder, version_id) for version_id in ids]
    for publication in new:
        publication.store(access.blobs)
    with access.writing("import a lineage", sum(one.nbytes for one in new)) as work:
        return [one.carry_out(work, action="import") for one in new]


def _index(path: Path) -> list[str]:
    value = _json(path)
    versions = value.get("versions") if isinstance(value, dict) else None
    if not isinstance(versions, list) or value.get("format") != FORMAT:
        raise RegistryError(f"{path} does not say {FORMAT!r} with a list of versions; give a folder that export wrote")
    for name in versions:
        if not (isinstance(name, str) and is_digest(name)):
            raise RegistryError(f"{path} names a version {str(name)[:80]!r}; expected 64 hexadecimal characters")
    if not versions or len(set(versions)) < len(versions):
        raise RegistryError(f"{path} names {len(versions)} versions, of which {len(set(versions))} differ; damaged")
    return versions


def _publication(folder: Path, version_id: str) -> Publication:
    path = folder / "manifests" / f"{version_id}.json"
    text = _read(path)
    if sha256_hex(text) != version_id:
        raise CorruptBlob(f"{path} was changed: its SHA-256 is {sha256_hex(text)}; export the version again")
    try:
        manifest = VersionManifest.from_dict(_json(path))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RegistryError(f"{path} is no record that this library reads ({error}); upgrade federated-peft") from None
    if manifest_text(manifest).encode() != text:
        raise RegistryError(f"{path} is not canonical JSON; export the version again")
    weights = folder / "weights" / f"{manifest.weights_digest}.safetensors"
    data = _read(weights)
    if sha256_hex(data) != manifest.weights_digest:
        raise CorruptBlob(f"{weights} was changed: its SHA-256 is {sha256_hex(data)}; export the version again")
    try:
        decode_tensors(data)
    except WireError as error:
        raise RegistryError(f"{weights} holds no adapter: {error}") from None
    return Publication(manifest, data)


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError):
        raise RegistryError(f"{path} is not JSON; export the version again") from None


def _read(path: Path) -> bytes:
    if path.is_symlink():
        raise RegistryError(f"{path} is a link; expected the file itself")
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise RegistryError(
            f"{path} is missing; export the version again, or give the folder that export wrote"
        ) from None
