"""Bringing a database's schema to the one that this library works with.

Alembic's scripts ship inside the package and run on the caller's connection, in one transaction; there is no ini
file and no command to remember. The audit log begins in the same transaction: with ``init`` in a new registry, with
``upgrade`` and what there was in one that had no log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, inspect, select, text
from sqlalchemy.orm import Session

from federated.errors import RegistryError
from federated.registry.audit_log import begin
from federated.registry.database import lock_for_upgrade, writing
from federated.registry.schema import HEAD, SCHEMA_TABLE, ChannelRow, VersionRow

__all__ = ["MIGRATIONS", "holds_registry", "upgrade"]

MIGRATIONS = Path(__file__).parent / "migrations"
"""Folder of the Alembic scripts."""

_MIGRATING = threading.Lock()  # Alembic keeps its context in module globals


def upgrade(engine: Engine, *, create: bool, label: str, now: datetime, actor: str) -> None:
    """Bring the schema to `HEAD`: one query when it is there already, else Alembic in one transaction.

    Args:
        engine: of the database.
        create: make a registry where there is none.
        label: of the registry, for messages.
        now: for the audit log's first row.
        actor: who opens it, likewise.

    Raises:
        RegistryError: if the database holds no registry and must not be made into one, or a newer library made it.
    """
    with engine.connect() as connection:
        current = _revision(connection)
    if current == HEAD:
        return
    if current is None and not create:
        raise RegistryError(f"the database of {label} holds no registry; check the path, or publish something first")
    with _MIGRATING, writing(engine).begin() as connection:
        lock_for_upgrade(connection)
        current = _revision(connection)  # another process may have been faster
        _migrate(connection, label, current)
        with Session(connection, join_transaction_mode="rollback_only") as session:
            begin(session, now=now, actor=actor, **_first_row(session, current))
            session.commit()


def holds_registry(engine: Engine) -> bool:
    """Whether the database has a registry's schema, of whatever age."""
    with engine.connect() as connection:
        return _revision(connection) is not None


def _first_row(session: Session, before: str | None) -> dict[str, Any]:
    if before is None:
        return {"action": "init", "details": {"schema": HEAD}}
    ids = list(session.scalars(select(VersionRow.version_id).order_by(VersionRow.sequence)))
    channels = {row.name: row.version_id for row in session.scalars(select(ChannelRow))}
    return {"action": "upgrade", "details": {"schema": HEAD, "from": before, "versions": ids, "channels": channels}}


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(SCHEMA_TABLE):
        return None
    revision: str | None = connection.scalar(text(f"SELECT version_num FROM {SCHEMA_TABLE}"))  # noqa: S608 (a constant)
    return revision


def _migrate(connection: Connection, label: str, current: str | None) -> None:
    # Imported here: most openings find the schema at its head and never need it.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    try:
        with _quiet("alembic"):
            command.upgrade(config, "head")
    except CommandError as error:
        raise RegistryError(
            f"registry {label} has schema {current}, newer than this library's {HEAD}; upgrade federated-peft"
        ) from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A run's logging often shows INFO of every library; a schema upgrade is no news to its user."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
