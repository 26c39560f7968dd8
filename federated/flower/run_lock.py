"""One server for each run: a lock on its folder that goes with the process, whatever ends it.

Two servers of one run would publish two lineages and charge one ledger twice. It happens where a server is thought
dead and is not: after a network fault, or a command given twice.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from federated.errors import ConfigError

__all__ = ["FILE", "alone"]

FILE = "run.lock"
_PATIENCE = 5.0
"""Seconds for the workers of a server that was just killed to notice: they hold what they inherited."""
_LOOK = 0.05


@contextmanager
def alone(folder: Path, *, patience: float = _PATIENCE) -> Iterator[None]:
    """Hold a run's folder.

    Args:
        folder: of the run.
        patience: seconds to wait for another server of it to end.

    Raises:
        ConfigError: if another server works on it, or the folder cannot be written.
    """
    path = folder / FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; a run holds its folder while it works") from None
    try:
        _locked(descriptor, folder, time.monotonic() + patience)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int, folder: Path, end: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                who = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
                raise ConfigError(
                    f"run_dir = {folder}: another server works on this run (process {who}); stop that one first"
                ) from None
            time.sleep(_LOOK)
