"""One file of a release from a source to the disk: counted, hashed on the way, and visible only once it is right."""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from tuf.api.metadata import TargetFile

from federated.errors import EndlessData, WrongContent
from federated.release.disk import translated
from federated.release.roles import file_name
from federated.release.source import CHUNK, Source, chunks_of

__all__ = ["digest_of_target", "holds", "transfer"]


def digest_of_target(target: TargetFile) -> str:
    """The SHA-256 that was signed.

    Raises:
        WrongContent: if another hash was signed alone.
    """
    digest = target.hashes.get("sha256")
    if digest is None:
        raise WrongContent(f"no SHA-256 is signed for {target.path}, found {sorted(target.hashes)}")
    return digest


def holds(path: Path, target: TargetFile) -> bool:
    """Whether the file is there with the length and hash that were signed; it is read again.

    Raises:
        ReleaseError: if it is there and cannot be read.
    """
    with translated(f"read {path.name}"):
        if not path.is_file() or path.stat().st_size != target.length:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest_of_target(target)


def transfer(source: Source, target: TargetFile, path: Path, *, limit: int) -> None:
    """Fetch a target to ``path``, which appears whole or not at all.

    Args:
        source: not trusted.
        target: length and hash, as signed.
        path: its folder is made.
        limit: bytes, whatever was signed.

    Raises:
        EndlessData: if more was signed than may be fetched, or more is sent than was signed.
        WrongContent: if the bytes are others.
        MissingFile, Unreachable: as the source raises them.
        ReleaseError: if the disk refuses.
    """
    digest = digest_of_target(target)
    if target.length > limit:
        raise EndlessData(f"{target.path} has {target.length} bytes, and this device takes at most {limit} at once")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    with translated(f"write {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(source, quote(file_name(target.path, digest)), beside, target)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _write(source: Source, name: str, path: Path, target: TargetFile) -> None:
    found, length = hashlib.sha256(), 0
    with path.open("xb", buffering=CHUNK) as file, closing(chunks_of(source, name, target.length)) as chunks:
        for chunk in chunks:
            found.update(chunk)
            length += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if length != target.length or found.hexdigest() != target.hashes["sha256"]:
        raise WrongContent(
            f"{target.path} from {source.label} has {length} bytes with SHA-256 {found.hexdigest()}, signed are "
            f"{target.length} with {target.hashes['sha256']}: damaged or tampered with; nothing was installed"
        )
