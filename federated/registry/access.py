"""How everything in this room reaches the database: one session for reading, one transaction for writing.

A `Transaction` carries what each change needs besides its session: the time, who makes it, and the audit log that it
is noted in, so that nothing is changed without being noted in the same transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from federated.errors import RegistryError
from federated.registry.audit_log import append, head_of
from federated.registry.blobs import Blobs
from federated.registry.database import Place, reading, writing
from federated.registry.translate import translated

__all__ = ["Access", "Transaction", "utc"]


def utc(when: datetime) -> datetime:
    """A time as the tables hold it: UTC, without a zone."""
    return when.astimezone(UTC).replace(tzinfo=None)


@dataclass(frozen=True)
class Transaction:
    """One change of the registry, while it is being made; all of it is committed, or nothing.

    Args:
        session: inside its transaction, with the audit log's head locked.
        now: when, with its zone.
        actor: who, as they say.
        blobs: where bytes are.
    """

    session: Session
    now: datetime
    actor: str
    blobs: Blobs

    @property
    def at(self) -> datetime:
        """The time as the tables hold it."""
        return utc(self.now)

    def note(self, action: str, subject: str, **details: Any) -> None:
        """Append a row to the audit log."""
        append(self.session, now=self.now, actor=self.actor, action=action, subject=subject, details=details)


class Access:
    """An open registry's database and blobs, shared by all who work on it.

    Threads may share it: each block uses a database connection of its own.
    """

    def __init__(
        self, place: Place, engine: Engine, *, blobs: Blobs, clock: Callable[[], datetime], actor: str
    ) -> None:
        self.place = place
        self.blobs = blobs
        self._engine: Engine | None = engine
        self._clock = clock
        self._actor = actor

    @contextmanager
    def translated(self, doing: str, needed: int = 0) -> Iterator[None]:
        """Let nothing foreign out; see `federated.registry.translate`."""
        with translated(doing, self.place.label, folder=self.place.disk, needed=needed):
            yield

    @contextmanager
    def reading(self, doing: str) -> Iterator[Session]:
        """A session that only reads, and sees one state of the database throughout."""
        with self.translated(doing), Session(reading(self._opened())) as session:
            yield session

    @contextmanager
    def writing(self, doing: str, needed: int = 0) -> Iterator[Transaction]:
        """A transaction; writers queue up at its start, also those of other processes."""
        bind = writing(self._opened())
        with self.translated(doing, needed), Session(bind, expire_on_commit=False) as session, session.begin():
            head_of(session, lock=True)
            yield Transaction(session, self.now(), self._actor, self.blobs)

    def now(self) -> datetime:
        """The time, UTC."""
        return self._clock().astimezone(UTC)

    def close(self) -> None:
        """Let go of the database; a second time does nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            with self.translated("close the registry"):
                engine.dispose()

    def _opened(self) -> Engine:
        if self._engine is None:
            raise RegistryError(f"registry {self.place.label} is closed; open it again")
        return self._engine
