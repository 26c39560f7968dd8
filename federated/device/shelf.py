"""Versions on the device's disk: one folder each, which appears whole, is never changed, and is checked when read.

    versions/VERSION_ID/manifest.json, weights.safetensors, probes.json, stored.json

Called by `federated.device.agent`, the only writer. Imports neither torch nor SQLAlchemy.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federated.errors import ReleaseError
from federated.files import sync_folder
from federated.manifest import VersionManifest, canonical_json, sha256_hex
from federated.release import ReleaseRecord
from federated.release.disk import translated, write_file
from federated.release.roles import MANIFEST, PROBES, WEIGHTS

__all__ = ["Shelf", "Stored"]

_STORED = "stored.json"
_STAGING = ".staging-"
_DAMAGED = (errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EBADMSG)
"""What a worn medium answers; a version that reads so is fetched again, as one with other bytes is."""


@dataclass(frozen=True)
class Stored:
    """A version as it was put on the shelf.

    Args:
        record: what was signed of it.
        manifest: its record.
        weights: its full canonical weights.
        probes: the release's probes; None if it had none.
    """

    record: ReleaseRecord
    manifest: VersionManifest
    weights: bytes = field(repr=False)
    probes: bytes | None = None


class Shelf:
    """Versions in a folder.

    Args:
        folder: made when the first one is put there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, record: ReleaseRecord, manifest: VersionManifest, weights: Path, probes: bytes | None) -> None:
        """Put a verified version on the shelf; one that is there is left as it is.

        Args:
            record: what was signed of it.
            manifest: its record.
            weights: file of its verified weights, of which a link or a copy is made.
            probes: the release's, verified.

        Raises:
            ReleaseError: if the disk refuses; then nothing is on the shelf.
        """
        place = self._folder / record.version_id
        with translated("put a version on the shelf"):
            if place.exists():
                return
            staging = self._folder / f"{_STAGING}{record.version_id}"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            _link(weights, staging / WEIGHTS)
            write_file(staging / MANIFEST, canonical_json(manifest.to_dict()))
            if probes is not None:
                write_file(staging / PROBES, probes)
            stored = {"record": record.to_custom(), "probes": None if probes is None else sha256_hex(probes)}
            write_file(staging / _STORED, canonical_json(stored))
            sync_folder(staging)
            staging.rename(place)
            sync_folder(self._folder)

    def get(self, version_id: str) -> Stored | None:
        """A version; None if it is not there, or its bytes are not what they were.

        Raises:
            ReleaseError: if it is there and cannot be read.
        """
        with translated("read a version"):
            try:
                return _read(self._folder / version_id, version_id)
            except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, ReleaseError):
                return None
            except OSError as error:
                if error.errno in _DAMAGED:
                    return None
                raise

    def record(self, version_id: str) -> ReleaseRecord | None:
        """What was signed of a version that is there; its weights are not read."""
        try:
            stored: dict[str, Any] = json.loads((self._folder / version_id / _STORED).read_bytes())
            return ReleaseRecord.from_custom(stored["record"], version_id)
        except (OSError, ValueError, TypeError, KeyError, ReleaseError):
            return None

    def manifest(self, version_id: str) -> VersionManifest | None:
        """The record of a version that is there, also where its weights are damaged; None if it is damaged itself."""
        try:
            found = VersionManifest.from_dict(json.loads((self._folder / version_id / MANIFEST).read_bytes()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return found if found.version_id == version_id else None

    def ids(self) -> list[str]:
        """The versions that are there, sorted."""
        if not self._folder.is_dir():
            return []
        return sorted(path.name for path in self._folder.iterdir() if not path.name.startswith("."))

    def weights(self) -> list[Path]:
        """The files of all versions' weights; whoever uses them checks them."""
        return [self._folder / one / WEIGHTS for one in self.ids()]

    def drop(self, version_id: str) -> None:
        """Take a version off; a kill meanwhile leaves it whole or as rubbish that `sweep` removes.

        Raises:
            ReleaseError: if the disk refuses.
        """
        place = self._folder / version_id
        gone = self._folder / f"{_STAGING}{version_id}"
        with translated("take a version off the shelf"):
            shutil.rmtree(gone, ignore_errors=True)
            if place.exists():
                place.rename(gone)
                shutil.rmtree(gone)

    def sweep(self, keep: Collection[str]) -> None:
        """Remove what kills left, and all versions but these.

        Raises:
            ReleaseError: if the disk refuses.
        """
        with translated("sweep the shelf"):
            for path in self._folder.glob(f"{_STAGING}*"):
                shutil.rmtree(path)
        for version_id in self.ids():
            if version_id not in keep:
                self.drop(version_id)


def _link(source: Path, place: Path) -> None:
    """A second name for verified bytes that are on the disk already; a copy where the file system has no links."""
    try:
        place.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, place)
        with place.open("rb") as file:
            os.fsync(file.fileno())


def _read(place: Path, version_id: str) -> Stored | None:
    stored = json.loads((place / _STORED).read_bytes())
    record = ReleaseRecord.from_custom(stored["record"], version_id)
    manifest = VersionManifest.from_dict(json.loads((place / MANIFEST).read_bytes()))
    weights = (place / WEIGHTS).read_bytes()
    probes = None if stored["probes"] is None else (place / PROBES).read_bytes()
    whole = (
        record.version_id == manifest.version_id == version_id
        and sha256_hex(weights) == manifest.weights_digest
        and (probes is None or sha256_hex(probes) == stored["probes"])
    )
    return Stored(record, manifest, weights, probes) if whole else None
