"""The tables behind the book of devices, and transactions on it. Used by `federated.deployment.devices`.

SQLite of the standard library, in its write-ahead mode: several processes read and one at a time writes.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from federated.errors import DeploymentError

__all__ = ["DATABASE", "open_book", "transaction"]

DATABASE = "devices.db"
_FORMAT = 1
_PATIENCE = 30.0  # seconds for which a writer waits for another one

_TABLES = """
CREATE TABLE invitations (
    number INTEGER PRIMARY KEY,
    client_id TEXT NOT NULL COLLATE NOCASE,
    token_sha256 BLOB NOT NULL UNIQUE CHECK (length(token_sha256) = 32),
    made_at TEXT NOT NULL,
    expires_at TEXT NOT NULL,
    auto_approve INTEGER NOT NULL CHECK (auto_approve IN (0, 1)),
    used_at TEXT,
    used_by INTEGER REFERENCES devices (number),
    withdrawn_at TEXT,
    refused_at TEXT
);
CREATE INDEX invitations_by_name ON invitations (client_id);
CREATE TABLE devices (
    number INTEGER PRIMARY KEY,
    client_id TEXT NOT NULL COLLATE NOCASE,
    node_key TEXT NOT NULL UNIQUE,
    update_key BLOB NOT NULL UNIQUE CHECK (length(update_key) = 32),
    state TEXT NOT NULL CHECK (state IN ('pending', 'approved', 'revoked')),
    enrolled_at TEXT NOT NULL,
    approved_at TEXT,
    revoked_at TEXT,
    remark TEXT NOT NULL DEFAULT '',
    node_id TEXT NOT NULL DEFAULT '',
    registering TEXT
);
CREATE UNIQUE INDEX one_device_of_a_name ON devices (client_id) WHERE state != 'revoked';
CREATE TABLE log (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    client_id TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE TRIGGER log_is_not_rewritten BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_is_not_shortened BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER devices_are_not_forgotten BEFORE DELETE ON devices BEGIN SELECT RAISE(ABORT, 'kept for its keys'); END;
"""


def open_book(path: Path) -> None:
    """Make the database if it is not there, for its owner alone.

    Raises:
        DeploymentError: if it cannot be opened, or is of another format.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would make it readable for others
    except OSError as error:
        raise DeploymentError(f"cannot open {path}: {error.strerror}") from error
    with _connected(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    with transaction(path) as connection:
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found == 0:
            for statement in _statements():
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_FORMAT}")
        elif found != _FORMAT:
            raise DeploymentError(f"{path} has format {found}, expected {_FORMAT}: use the version that wrote it")


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """Alone at writing, until the block ends; then all of it is kept, or, after an error, nothing.

    Raises:
        DeploymentError: if the database is damaged, full, or busy for too long.
    """
    with _connected(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
    except sqlite3.Error as error:
        raise DeploymentError(f"the book of devices {path} cannot be used: {error}") from error


def _statements() -> Iterator[str]:
    """One by one: `executescript` would commit what was done before it."""
    waiting = ""
    for line in _TABLES.splitlines():
        waiting += f"{line}\n"
        if sqlite3.complete_statement(waiting):
            yield waiting
            waiting = ""
