"""Where a registry lives and how its database is opened: places, engines, SQLite's settings.

Knows nothing of versions. SQLite is one file beside the blobs (write-ahead log, full synchronisation, foreign
keys on). PostgreSQL is reached by its URL, through psycopg.
"""

from __future__ import annotations

import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from federated.errors import RegistryError

__all__ = [
    "BUSY_SECONDS",
    "DATABASE_NAME",
    "Place",
    "locate",
    "lock_for_upgrade",
    "open_engine",
    "open_frozen",
    "prepare",
    "reading",
    "writing",
]

BUSY_SECONDS = 30.0
"""How long a writer waits for another one."""

DATABASE_NAME = "registry.db"

_UPGRADE_LOCK = 0x66706674  # any number that no other application in the database takes


@dataclass(frozen=True)
class Place:
    """Where a registry is.

    Args:
        url: of the database.
        blobs: folder of the blobs, or their fsspec URL.
        label: how messages name it; without a password.
        file: the database file, where the database is SQLite.
    """

    url: URL
    blobs: Path | str
    label: str
    file: Path | None

    @property
    def disk(self) -> Path:
        """The folder whose free space counts; the working directory where everything is elsewhere."""
        if isinstance(self.blobs, Path):
            return self.blobs
        return Path() if self.file is None else self.file.parent


def locate(location: str | Path, blobs: str | Path | None = None) -> Place:
    """Read a folder, or an SQLAlchemy URL with its blob folder.

    Raises:
        RegistryError: if a URL comes without ``blobs``, names a database in memory, or one that is not supported.
        sqlalchemy.exc.ArgumentError: if it is no URL at all.
    """
    if isinstance(location, str) and "://" in location:
        return _from_url(make_url(location), blobs)
    folder = Path(location).expanduser().absolute()
    file = folder / DATABASE_NAME
    store = folder / "blobs" if blobs is None else _blobs_at(blobs)
    return Place(URL.create("sqlite", database=str(file)), store, str(folder), file)


def _from_url(url: URL, blobs: str | Path | None) -> Place:
    label = url.render_as_string(hide_password=True)
    if blobs is None:
        raise RegistryError(
            f"registry {label} is a URL and needs a place for its blobs: pass blobs=FOLDER_OR_URL too (--blobs)"
        )
    store = _blobs_at(blobs)
    if url.drivername == "postgresql":  # SQLAlchemy before 2.1 would take psycopg2
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "postgresql":
        return Place(url, store, label, None)
    if url.get_backend_name() != "sqlite":
        raise RegistryError(
            f"registry {label}: expected a folder, sqlite:///PATH or postgresql://USER@HOST/DATABASE, found a URL of "
            f"{url.get_backend_name()!r}"
        )
    database = url.database or ":memory:"
    if ":memory:" in database or database.startswith("file:"):
        raise RegistryError(f"registry {label} would not be kept in a plain file; use sqlite:///PATH or a folder")
    return Place(url, store, label, Path(database).absolute())


def _blobs_at(blobs: str | Path) -> Path | str:
    if isinstance(blobs, str) and "://" in blobs and not blobs.startswith("file://"):
        return blobs
    return Path(str(blobs).removeprefix("file://")).expanduser().absolute()


def prepare(place: Place, *, create: bool) -> None:
    """Make the folders, or check that the database is there.

    Raises:
        RegistryError: if it is not there and must not be made, or its folder cannot be written to.
    """
    if place.file is not None and not create and not place.file.is_file():
        raise RegistryError(f"there is no registry at {place.label}; check the path, or publish something there first")
    for folder in [one for one in (place.blobs, place.file and place.file.parent) if isinstance(one, Path)]:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise RegistryError(
                f"the registry's folder {folder} cannot be written to (its database needs that even for reading); "
                f"fix its permissions, or copy it to another folder"
            )


def open_engine(place: Place) -> Engine:
    """An engine for the place; nothing is connected yet.

    Raises:
        RegistryError: if the database's driver is not installed.
    """
    if place.file is None:
        return _server_engine(place)
    engine = create_engine(place.url, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def open_frozen(place: Place) -> Engine | None:
    """An engine that only reads an SQLite file, for a disk too full for the files that SQLite wants beside it.

    Returns:
        None where that is impossible: another database, no file, or a log that was not written back yet.
    """
    if place.file is None or not _has_bytes(place.file):
        return None
    log = place.file.with_name(place.file.name + "-wal")
    if _has_bytes(log):
        return None
    query = {"mode": "ro", "immutable": "1", "uri": "true"}
    engine = create_engine(URL.create("sqlite", database=f"file:{quote(str(place.file))}", query=query))
    event.listen(engine, "begin", _on_begin)
    return engine


def _has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _server_engine(place: Place) -> Engine:
    try:
        engine = create_engine(place.url, pool_pre_ping=True)
    except ImportError as error:
        extra = "; install federated-peft[postgres]" if error.name == "psycopg" else "; install it"
        raise RegistryError(
            f"registry {place.label} needs the Python package {error.name!r}, which is not installed{extra}"
        ) from error
    event.listen(engine, "connect", _on_postgres)
    return engine


def _on_postgres(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    """Wait for another writer as long as on SQLite, and no longer."""
    cursor: Any = connection.cursor()
    try:
        cursor.execute(f"SET lock_timeout = {int(BUSY_SECONDS * 1000)}")
    finally:
        cursor.close()
    connection.commit()


def writing(engine: Engine) -> Engine:
    """The same engine for transactions that write: they queue up at their start, not in the middle."""
    return engine.execution_options(registry_write=True)


def reading(engine: Engine) -> Engine:
    """The same engine for sessions that only read, and see one state of the database throughout.

    SQLite's transactions do anyhow.
    """
    if engine.dialect.name != "postgresql":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ")


def lock_for_upgrade(connection: Connection) -> None:
    """Let one process at a time change the schema, even while there is no table to lock, until the transaction ends.

    SQLite's writers queue up anyhow.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})")


def _on_connect(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    # The sqlite3 module would start transactions on its own, late and not for DDL; we say BEGIN ourselves.
    connection.isolation_level = None
    cursor: Any = connection.cursor()
    try:
        _use_wal(cursor)
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
    finally:
        cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Switch to the write-ahead log; SQLite does not wait for its lock here, so we do."""
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _on_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("registry_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
