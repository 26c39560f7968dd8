"""Files that a kill or a power cut leaves as they were or as they should be. No torch, and no error of its own.

What the file system raises goes through: each room says in its own words what that means there. Called by
`federated.registry`, `federated.release`, `federated.device` and `federated.deployment`.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["remove_left", "sync_folder", "write_new", "write_whole"]


def write_whole(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write beside the place, flush to the disk, rename. A kill leaves the old file or the new one.

    A killed writer leaves ``.NAME-RANDOM.tmp`` in the folder, NAME cut to twelve characters: `remove_left`.

    Args:
        path: its folder must be there; `sync_folder` makes the rename survive a power cut too.
        data: all of it.
        mode: permissions, before the umask.

    Raises:
        OSError: as the file system raises it; the old file is still there then.
    """
    beside = _beside(path)
    try:
        _write(beside, data, mode)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_new(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """As `write_whole`, and never over something: of several writers one wins, and its bytes are there whole.

    Args:
        path: its folder must be there.
        data: all of it.
        mode: permissions, before the umask.

    Raises:
        FileExistsError: if something is there already, which stays as it is.
        OSError: as the file system raises it; one without hard links cannot do this.
    """
    beside = _beside(path)
    try:
        _write(beside, data, mode)
        path.hardlink_to(beside)
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:12]}-{secrets.token_hex(8)}.tmp")


def _write(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that renames in it survive a power cut.

    Raises:
        OSError: as the file system raises it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_left(folder: Path) -> None:
    """Remove what killed writers left in a folder; nobody may be writing there now.

    Raises:
        OSError: as the file system raises it.
    """
    for path in folder.glob(".*-????????????????.tmp"):
        path.unlink(missing_ok=True)
