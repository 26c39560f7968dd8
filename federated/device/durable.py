"""Small files that a kill or a power cut leaves as they were or as they should be. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from federated import files
from federated.errors import DeviceError

__all__ = ["read_whole", "translated", "write_whole"]


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Run a block so that what the file system raises arrives as one clear error.

    Raises:
        DeviceError: for every `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise DeviceError(
            f"cannot {doing}: {error.strerror or error} ({error.filename}); check that the state folder exists, has "
            "room and can be written to"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the place, flush to the disk, rename, flush the folder; only the owner may read the file.

    Raises:
        DeviceError: if the file system refuses; the old file is still there then.
    """
    with translated(f"write {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.write_whole(path, data, mode=0o600)
        files.sync_folder(path.parent)


def read_whole(path: Path) -> bytes | None:
    """The file's bytes; None if there is none.

    Raises:
        DeviceError: if it is there and cannot be read.
    """
    with translated(f"read {path.name}"):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
