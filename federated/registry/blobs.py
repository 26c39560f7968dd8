"""Content-addressed bytes in a folder: ``blobs/ab/abcdef...``, named by their SHA-256.

A blob appears whole or not at all: it is written beside its place, flushed to the disk and renamed. It is never
changed. What a blob means, and which are needed, only the database knows: `federated.registry.collect` deletes those
that no row names.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

from federated.errors import CorruptBlob
from federated.manifest import sha256_hex

__all__ = ["STRAY_SECONDS", "BlobStore"]

STRAY_SECONDS = 3600.0
"""Age from which a temporary file cannot belong to a living writer any more."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """A folder of immutable blobs.

    Args:
        root: the folder; made on the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        """Where the blob of this digest is or would be.

        Raises:
            CorruptBlob: if ``digest`` is no SHA-256, so that a forged record cannot name a file elsewhere.
        """
        if not _DIGEST.fullmatch(digest):
            raise CorruptBlob(
                f"a record names a blob {digest!r}, which is no SHA-256 digest: the database was changed from "
                f"outside; restore it from a backup"
            )
        return self.root / digest[:2] / digest

    def put(self, data: bytes) -> str:
        """Store ``data`` durably and return its SHA-256; a damaged blob of this digest is replaced.

        Raises:
            OSError: as the file system raises it; nothing visible was changed.
        """
        digest = sha256_hex(data)
        path = self.path(digest)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            _sync_folder(self.root)
        if not _holds(path, digest):
            _write(path, data)
        _sync_folder(path.parent)
        return digest

    def has(self, digest: str) -> bool:
        """Whether there is a blob of this digest; its bytes are not read."""
        return self.path(digest).is_file()

    def read(self, digest: str) -> bytes:
        """The blob's bytes, hashed again.

        Raises:
            CorruptBlob: if the file is missing or its bytes have another digest.
        """
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise CorruptBlob(f"blob {path} is missing (expected {digest}); {_REPAIR}") from None
        found = sha256_hex(data)
        if found != digest:
            raise CorruptBlob(f"blob {path} is damaged: its SHA-256 is {found}, expected {digest}; {_REPAIR}")
        return data

    def digests(self) -> set[str]:
        """The digests of all blobs."""
        return {path.name for path in self.root.glob("??/*") if _DIGEST.fullmatch(path.name)}

    def delete(self, digests: Iterable[str]) -> int:
        """Remove blobs; returns the bytes that were freed. One that is not there any more is passed over."""
        freed = 0
        for path in map(self.path, digests):
            try:
                freed += path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                continue
        return freed

    def size(self, digest: str) -> int:
        """Bytes of a blob; 0 where there is none."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def sweep(self) -> int:
        """Remove temporary files that a killed writer left more than an hour ago; returns how many.

        Age decides, not the writer's process id: the folder may be shared by several machines.
        """
        stray = [path for path in self.root.glob("*/.*.tmp") if _is_old(path)]
        for path in stray:
            path.unlink(missing_ok=True)
        return len(stray)


_REPAIR = "publish the same version again to repair it, or restore the file from a backup"


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_hex(path.read_bytes()) == digest


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > STRAY_SECONDS
    except FileNotFoundError:  # its writer renamed it meanwhile
        return False


def _write(path: Path, data: bytes) -> None:
    beside = path.parent / f".{path.name[:12]}-{secrets.token_hex(8)}.tmp"
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
