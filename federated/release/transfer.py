"""One file of a release from a source to the disk: counted, hashed on the way, and visible only once it is right.

What came before a transfer broke stays beside its place, under the digest that it is to have, and the next transfer
goes on from there. Whether those bytes are the right ones, the hash of the whole file says.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tuf.api.metadata import TargetFile

from federated.errors import EndlessData, UntrustedRelease, WrongContent
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

    A part that is there from an earlier transfer is gone on with. If the outcome is not what was signed, everything
    is dropped and, where there was such a part, fetched once more from zero: it may have been the part.

    Args:
        source: not trusted.
        target: length and hash, as signed.
        path: its folder is made. One transfer to it at a time: the caller holds the folder.
        limit: bytes, whatever was signed.

    Raises:
        EndlessData: if more was signed than may be fetched, or more is sent than was signed.
        WrongContent: if the bytes are others.
        MissingFile, Unreachable: as the source raises them; what came so far stays for the next time.
        ReleaseError: if the disk refuses.
    """
    digest = digest_of_target(target)
    if target.length > limit:
        raise EndlessData(f"{target.path} has {target.length} bytes, and this device takes at most {limit} at once")
    part = path.with_name(f".{digest}.part")
    with translated(f"write {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = part.exists()
        try:
            _complete(source, target, part)
        except UntrustedRelease:
            part.unlink()
            if not begun:
                raise
            _afresh(source, target, part)
        part.replace(path)


def _begun(part: Path) -> tuple[Any, int]:
    """The hash of what is there so far, to be gone on with, and its length."""
    if not part.exists():
        return hashlib.sha256(), 0
    with part.open("rb") as file:
        return hashlib.file_digest(file, "sha256"), file.tell()


def _afresh(source: Source, target: TargetFile, part: Path) -> None:
    try:
        _complete(source, target, part)
    except UntrustedRelease:
        part.unlink()
        raise


def _complete(source: Source, target: TargetFile, part: Path) -> None:
    """Bring a part, empty at first, to the signed length and hash."""
    digest = digest_of_target(target)
    found, length = _begun(part)
    with part.open("ab", buffering=CHUNK) as file:
        if length < target.length:
            name = quote(file_name(target.path, digest))
            with closing(chunks_of(source, name, target.length - length, start=length)) as chunks:
                for chunk in chunks:
                    found.update(chunk)
                    length += file.write(chunk)
                    file.flush()  # a kill loses none of what came over a slow line
        file.flush()
        os.fsync(file.fileno())
    if length != target.length or found.hexdigest() != digest:
        raise WrongContent(
            f"{target.path} from {source.label} has {length} bytes with SHA-256 {found.hexdigest()}, signed are "
            f"{target.length} with {digest}: damaged or tampered with; nothing was installed"
        )
