"""Files that a kill or a power cut leaves as they were or as they should be. No torch, and no error of its own.

What the file system raises goes through: each room says in its own words what that means there. Called by
`federated.registry`, `federated.release` and `federated.device`.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["remove_left", "sync_folder", "write_whole"]


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
    beside = path.with_name(f".{path.name[:12]}-{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


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
