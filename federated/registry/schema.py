"""The two tables, as typed SQLAlchemy models.

A version's row is written once and never changed; only channels move. The manifest's canonical JSON is stored
whole, so that its digest can be checked on every read; the other columns repeat what queries need. How a database
gets these tables is `federated.registry.database`'s business (Alembic), never ``create_all``.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Index, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["HEAD", "SCHEMA_TABLE", "Base", "ChannelRow", "VersionRow"]

HEAD = "0001"
"""Alembic revision that this library works with; a test compares it with the newest migration."""

SCHEMA_TABLE = "registry_schema"
"""Alembic's own table here; not its default name, which another application in the database may use."""


class Base(DeclarativeBase):
    """Root of the models; names constraints alike on every database."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
        }
    )


class VersionRow(Base):
    """One published version; ``sequence`` is the order of publication, times are UTC without a zone."""

    __tablename__ = "registry_versions"
    __table_args__ = (
        Index("ix_registry_versions_run", "run_id", "round_number"),
        {"sqlite_autoincrement": True},
    )

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    version_id: Mapped[str] = mapped_column(String(64), unique=True)
    run_id: Mapped[str] = mapped_column(String(200))
    round_number: Mapped[int]
    parent: Mapped[str | None] = mapped_column(String(64), ForeignKey("registry_versions.version_id"))
    base_digest: Mapped[str] = mapped_column(String(200))
    weights_digest: Mapped[str] = mapped_column(String(64))
    state_digest: Mapped[str | None] = mapped_column(String(64))
    manifest: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime]


class ChannelRow(Base):
    """A named pointer at a version."""

    __tablename__ = "registry_channels"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    version_id: Mapped[str] = mapped_column(String(64), ForeignKey("registry_versions.version_id"))
    moved_at: Mapped[datetime]
