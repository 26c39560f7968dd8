"""One agent per state folder: a lock that goes with the process, whatever ends it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from federated.errors import DeviceError
from federated.release.disk import translated

__all__ = ["StateLock"]


class StateLock:
    """The lock of a state folder.

    Args:
        folder: made when the lock is taken.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Hold the folder.

        Raises:
            DeviceError: if another process holds it.
            ReleaseError: if it cannot be written.
        """
        with translated("hold the device's state"):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / "agent.lock").open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip()
            file.close()
            raise DeviceError(
                f"{self._folder} is held by another agent (process {holder}); stop that one first"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
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
