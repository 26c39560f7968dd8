"""Files of a release: written whole or not at all, one writer at a time, and no foreign exception.

Nothing here knows what is in them. Used on both sides: by the publisher for its folder, by a device for its state.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from federated.errors import ReleaseError
from federated.files import write_whole

__all__ = ["locked", "read_file", "translated", "write_file"]


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Run a block so that what the file system raises arrives as one clear error.

    Args:
        doing: what is being tried, for the message ("write the metadata").

    Raises:
        ReleaseError: for every `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise ReleaseError(
            f"cannot {doing}: {error.strerror or error} ({error.filename}); check that the folder exists, has room and "
            f"can be written to"
        ) from error


def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Make the folder and write the file: a kill leaves the old file or the new one.

    Args:
        path: its folder is made.
        data: all of it.
        mode: permissions, before the umask.

    Raises:
        OSError: as the file system raises it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data, mode=mode)


def read_file(path: Path) -> bytes | None:
    """The file's bytes; None if there is none.

    Raises:
        OSError: if it is there and cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder: another process that wants it waits. The folder is made.

    Raises:
        ReleaseError: if the lock file cannot be written.
    """
    with translated("hold the folder"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("wb")
    with lock:  # closing the file lets go
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
