"""A small file that only its owner may read, written whole or not at all: keys, and noise that was put on releases."""

from __future__ import annotations

import os
from pathlib import Path

from federated.errors import PrivacyError

__all__ = ["read_private", "write_private"]


def write_private(path: Path, data: bytes) -> None:
    """Put bytes in the place of what the file held; on disk when this returns.

    Args:
        path: the file; its folder must be there.
        data: all of it.

    Raises:
        OSError: if the disk refuses; the file is as it was.
    """
    half = path.with_name(f"{path.name}.part")
    half.unlink(missing_ok=True)
    descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def read_private(path: Path, what: str) -> bytes | None:
    """What the file holds; None where there is none.

    Args:
        path: the file.
        what: it holds, in words, for the error.

    Raises:
        OSError: if it cannot be read.
        PrivacyError: if others can read it.
    """
    if not path.exists():
        return None
    data = path.read_bytes()
    if path.stat().st_mode & 0o077:
        raise PrivacyError(f"{path}: others can read {what}; start a new run (wanted: 0600)")
    return data
