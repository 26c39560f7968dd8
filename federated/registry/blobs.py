"""Content-addressed bytes: what every store of them can do, and the one in a folder.

In a folder a blob is ``blobs/ab/abcdef...``, named by its SHA-256; `federated.registry.remote_blobs` keeps them
elsewhere.

A blob appears whole or not at all: it is written beside its place, flushed to the disk and renamed. It is never
changed. What a blob means, and which are needed, only the database knows: `federated.registry.collect` deletes those
that no row names.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from federated.errors import CorruptBlob
from federated.files import sync_folder, write_whole
from federated.manifest import sha256_hex

__all__ = ["REPAIR", "STRAY_SECONDS", "BlobStore", "Blobs", "check_digest", "is_digest"]

STRAY_SECONDS = 3600.0
"""Age from which a temporary file cannot belong to a living writer any more."""

REPAIR = "publish the same version again to repair it, or restore the file from a backup"
"""What to do about a blob that is damaged or missing."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Blobs(Protocol):
    """Immutable bytes, named by their SHA-256."""

    def put(self, data: bytes) -> str:
        """Store bytes durably and return their SHA-256; a damaged blob of this digest is replaced."""
        ...

    def has(self, digest: str) -> bool:
        """Whether there is a blob of this digest; its bytes are not read."""
        ...

    def read(self, digest: str) -> bytes:
        """The blob's bytes, hashed again.

        Raises:
            CorruptBlob: if it is missing or its bytes have another digest.
        """
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every blob, by digest."""
        ...

    def delete(self, digests: Iterable[str]) -> None:
        """Remove blobs; one that is not there any more is passed over."""
        ...

    def sweep(self) -> int:
        """Remove what killed writers left unfinished; returns how many files."""
        ...


def is_digest(name: str) -> bool:
    """Whether a name is a SHA-256 digest."""
    return _DIGEST.fullmatch(name) is not None


def check_digest(digest: str) -> str:
    """The digest itself, so that a forged record cannot name a file elsewhere.

    Raises:
        CorruptBlob: if it is none.
    """
    if not is_digest(digest):
        raise CorruptBlob(
            f"a record names a blob {digest!r}, which is no SHA-256 digest: the database was changed from "
            f"outside; restore it from a backup"
        )
    return digest


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
            CorruptBlob: if ``digest`` is no SHA-256.
        """
        return self.root / check_digest(digest)[:2] / digest

    def put(self, data: bytes) -> str:
        """Store ``data`` durably and return its SHA-256; a damaged blob of this digest is replaced.

        Raises:
            OSError: as the file system raises it; nothing visible was changed.
        """
        digest = sha256_hex(data)
        path = self.path(digest)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(self.root)
        if not _holds(path, digest):
            write_whole(path, data)
        sync_folder(path.parent)
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
            raise CorruptBlob(f"blob {path} is missing (expected {digest}); {REPAIR}") from None
        found = sha256_hex(data)
        if found != digest:
            raise CorruptBlob(f"blob {path} is damaged: its SHA-256 is {found}, expected {digest}; {REPAIR}")
        return data

    def sizes(self) -> dict[str, int]:
        """Bytes of every blob, by digest."""
        found = {}
        for path in self.root.glob("??/*"):
            with suppress(FileNotFoundError):  # another gc was faster
                if is_digest(path.name):
                    found[path.name] = path.stat().st_size
        return found

    def delete(self, digests: Iterable[str]) -> None:
        """Remove blobs; one that is not there any more is passed over."""
        for path in map(self.path, digests):
            path.unlink(missing_ok=True)

    def sweep(self) -> int:
        """Remove temporary files that a killed writer left more than an hour ago; returns how many.

        Age decides, not the writer's process id: the folder may be shared by several machines.
        """
        stray = [path for path in self.root.glob("*/.*.tmp") if _is_old(path)]
        for path in stray:
            path.unlink(missing_ok=True)
        return len(stray)


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_hex(path.read_bytes()) == digest


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > STRAY_SECONDS
    except FileNotFoundError:  # its writer renamed it meanwhile
        return False
