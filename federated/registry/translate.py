"""Foreign exceptions in, `RegistryError` out: one clear message for whatever the disk or the database says.

Wraps every public operation of the registry. It never retries and never hides: the original exception stays
chained as the cause.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from federated.errors import RegistryError, StorageFull

__all__ = ["DATABASE_SPARE", "translated"]

DATABASE_SPARE = 128 * 1024
"""Bytes that the database wants besides the blobs: a few pages and their log."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_SQLITE: Mapping[str, str] = {
    "SQLITE_BUSY": "another process has been writing to it for too long; wait for it to end, then try again",
    "SQLITE_NOTADB": "the file is no SQLite database; move it away, or give the folder of a registry",
    "SQLITE_CORRUPT": "the database file is damaged; restore it from a backup",
    "SQLITE_READONLY": "it is open for reading only; open it again if its disk was full, else fix its permissions",
    "SQLITE_CANTOPEN": "the database file cannot be opened; fix its permissions or choose another folder",
    "SQLITE_CONSTRAINT": "another writer was there first; look again, then try again",
}

_SERVER_FULL = "53100"
_POSTGRES: Mapping[str, str] = {
    "55P03": _SQLITE["SQLITE_BUSY"],
    "40": "another writer was in the way; try again",
    "23": _SQLITE["SQLITE_CONSTRAINT"],
    "42501": "this user may not do that; let the database's owner grant it",
    "25006": "the server is open for reading only; use the primary one",
}
"""By SQLSTATE, or its class."""


@contextmanager
def translated(doing: str, where: str, *, folder: Path, needed: int = 0) -> Iterator[None]:
    """Run a block so that it raises nothing foreign.

    Args:
        doing: what is being tried, for the message ("publish a version").
        where: the registry, for the message (never with a password).
        folder: where its blobs are: whose free space is looked at.
        needed: bytes about to be written.

    Raises:
        StorageFull: if the disk, a quota or the database is full.
        RegistryError: for every other `OSError` and database error.
    """
    try:
        yield
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        if _state(cause) == _SERVER_FULL:
            raise StorageFull(
                f"cannot {doing} in {where}: the database server's disk is full; everything published before is "
                f"intact. Free some space there, then try again"
            ) from error
        if _is_full(cause, folder):
            raise StorageFull(_full_message(doing, folder, needed)) from error
        raise RegistryError(f"cannot {doing} in {where}: {_advice(cause)}") from error


def _sqlite_name(cause: BaseException) -> str:
    return getattr(cause, "sqlite_errorname", "")


def _state(cause: BaseException) -> str:
    return getattr(cause, "sqlstate", None) or ""


def _is_full(cause: BaseException, folder: Path) -> bool:
    if isinstance(cause, OSError):
        return cause.errno in _FULL
    name = _sqlite_name(cause)
    # A full disk under SQLite's side files reads as an I/O error, a file that cannot be opened or written to.
    starved = (
        name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")) and _free_bytes(folder) < DATABASE_SPARE
    )
    return name == "SQLITE_FULL" or starved


def _free_bytes(folder: Path) -> int:
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
    return shutil.disk_usage(there).free


def _full_message(doing: str, folder: Path, needed: int) -> str:
    return (
        f"cannot {doing}: the disk under {folder} is full ({_free_bytes(folder)} bytes free, about "
        f"{needed + DATABASE_SPARE} needed; a quota may count too). Everything published before is intact. "
        f"Free some space or choose another folder, then try again"
    )


def _advice(cause: BaseException) -> str:
    if isinstance(cause, OSError):
        return f"{cause.strerror or cause} ({cause.filename}); check that the folder exists and can be written to"
    name = _sqlite_name(cause)
    known = next((text for prefix, text in _SQLITE.items() if name.startswith(prefix)), None)
    known = known or next((text for prefix, text in _POSTGRES.items() if _state(cause).startswith(prefix)), None)
    return known or f"the database says: {' '.join(str(cause).split())}"
