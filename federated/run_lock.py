"""Which process serves a run: one at a time, and none any more once that process is gone, however it ended.

A run's folder holds ``serving.lock``. The kernel lets go of the lock with the process, so that whoever looks knows at
once what a process manager learns from missing heartbeats a minute later, and two servers never write one run.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from federated.errors import ConfigError

__all__ = ["FILE", "Serving", "last_serving", "serving"]

FILE = "serving.lock"
_PATIENCE = 30.0
_LOOK = 0.1


@dataclass(frozen=True)
class Serving:
    """The process that served a run last.

    Args:
        pid: its number.
        since: when it began, in seconds since the epoch.
        alive: whether it still does.
    """

    pid: int
    since: float
    alive: bool


@contextmanager
def serving(folder: Path, *, patience: float = _PATIENCE) -> Iterator[None]:
    """Be the one process that serves a run; one that is ending is waited for.

    Forked children do not hold the lock. In one process it keeps nobody out.

    Args:
        folder: of the run.
        patience: seconds.

    Raises:
        ConfigError: if another process serves it, or the folder cannot be written.
    """
    try:
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"{folder / FILE}: {error.strerror}; it says which process serves the run") from None
    try:
        _take(descriptor, folder, time.monotonic() + patience)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "since": time.time()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path, end: float) -> None:
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() < end:
                time.sleep(_LOOK)
                continue
            said = os.pread(descriptor, 200, 0).decode(errors="replace")
            raise ConfigError(
                f"another process serves the run in {folder}: {said}; one run has one server: end that one first"
            ) from None


def last_serving(folder: Path) -> Serving | None:
    """Who served a run last, and whether it still does; None where nobody has begun.

    Not to be asked by the process that serves it: looking would let go of its lock.
    """
    try:
        descriptor = os.open(folder / FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        alive = not _free(descriptor)
        found = json.loads(os.pread(descriptor, 200, 0))
        return Serving(int(found["pid"]), float(found["since"]), alive)
    except (ValueError, KeyError, TypeError):  # between its lock and its name
        return Serving(0, 0.0, alive)
    finally:
        os.close(descriptor)


def _free(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
