"""One agent per state folder: a lock that goes with the process, whatever ends it."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from federated.errors import DeviceError
from federated.release.disk import translated

__all__ = ["StateLock"]

_TRIES, _STEP = 10, 0.02
"""`StateLock.is_held` takes the lock for a moment; whoever starts just then waits for it."""


class StateLock:
    """The lock of a state folder.

    Args:
        folder: made when the lock is taken.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Hold the folder; a disk that takes nothing any more is no hindrance, where the lock's file is there.

        Raises:
            DeviceError: if another process holds it.
            ReleaseError: if it cannot be made or opened.
        """
        with translated("hold the device's state"):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = _opened(self._folder / "agent.lock")
        if not any(_locked(file) for _ in range(_TRIES)):
            holder = file.read(20).decode("ascii", "replace").strip()
            file.close()
            raise DeviceError(
                f"{self._folder} is held by another agent (process {holder}); stop that one first"
            ) from None
        with suppress(OSError):  # the number is for people alone
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        self._file = file

    def release(self) -> None:
        """Let go."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def is_held(self) -> bool:
        """Whether an agent works in the folder now, in whatever process."""
        path = self._folder / "agent.lock"
        if not path.exists():
            return False
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _opened(path: Path) -> IO[bytes]:
    """Without a buffer, so that nothing is left to be written when it is closed."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    except OSError:
        if not path.is_file():
            raise
        return path.open("rb", buffering=0)


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_STEP)
        return False
    return True
