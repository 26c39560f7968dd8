"""The tables, as typed SQLAlchemy models.

A version's row is written once and never changed, a row of the audit log neither; only channels move. A manifest's
canonical JSON is stored whole, so that its digest can be checked on every read; the other columns repeat what queries
need. How a database gets these tables is `federated.registry.upgrades`' business (Alembic), never ``create_all``.

Times are UTC without a zone; the audit log's are texts, because its digests cover them.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Index, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = [
    "HEAD",
    "SCHEMA_TABLE",
    "ApprovalRow",
    "AuditHeadRow",
    "AuditRow",
    "Base",
    "ChannelRow",
    "DeviceRow",
    "EvaluationRow",
    "MoveRow",
    "PolicyRow",
    "TagRow",
    "VersionRow",
]

HEAD = "0002"
"""Alembic revision that this library works with; a test compares it with the newest migration."""

SCHEMA_TABLE = "registry_schema"
"""Alembic's own table here; not its default name, which another application in the database may use."""

_VERSION = "registry_versions.version_id"


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
    """One published version; ``sequence`` is the order of publication."""

    __tablename__ = "registry_versions"
    __table_args__ = (
        Index("ix_registry_versions_run", "run_id", "round_number"),
        Index("ix_registry_versions_adapter", "adapter_id", "release_counter"),
        Index("ix_registry_versions_parent", "parent"),
        Index("ix_registry_versions_weights", "weights_digest"),
        Index("ix_registry_versions_state", "state_digest"),
        {"sqlite_autoincrement": True},
    )

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    version_id: Mapped[str] = mapped_column(String(64), unique=True)
    run_id: Mapped[str] = mapped_column(String(200))
    round_number: Mapped[int]
    parent: Mapped[str | None] = mapped_column(String(64), ForeignKey(_VERSION))
    base_digest: Mapped[str] = mapped_column(String(200))
    weights_digest: Mapped[str] = mapped_column(String(64))
    state_digest: Mapped[str | None] = mapped_column(String(64))
    manifest: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime]
    adapter_id: Mapped[str] = mapped_column(String(100), server_default="")
    release_counter: Mapped[int] = mapped_column(server_default="0")


class ChannelRow(Base):
    """A named pointer at a version; ``move`` is the sequence of the move that put it there."""

    __tablename__ = "registry_channels"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    version_id: Mapped[str] = mapped_column(String(64), ForeignKey(_VERSION))
    moved_at: Mapped[datetime]
    move: Mapped[int | None]


class MoveRow(Base):
    """One move of a channel. ``below`` is the move that a rollback from here goes back to.

    Its version may be gone from the registry: what was removed stays in the history by its id.
    """

    __tablename__ = "registry_moves"
    __table_args__ = (Index("ix_registry_moves_channel", "channel"), {"sqlite_autoincrement": True})

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    channel: Mapped[str] = mapped_column(String(64))
    version_id: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(20))
    actor: Mapped[str] = mapped_column(String(200))
    moved_at: Mapped[datetime]
    below: Mapped[int | None]


class PolicyRow(Base):
    """How many people must approve a version before a channel moves to it."""

    __tablename__ = "registry_policies"

    channel: Mapped[str] = mapped_column(String(64), primary_key=True)
    approvals: Mapped[int]


class ApprovalRow(Base):
    """One person's approval of one version for one channel; ``person`` is the name as it is compared."""

    __tablename__ = "registry_approvals"
    __table_args__ = (
        UniqueConstraint("version_id", "channel", "person"),
        {"sqlite_autoincrement": True},
    )

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    version_id: Mapped[str] = mapped_column(String(64), ForeignKey(_VERSION))
    channel: Mapped[str] = mapped_column(String(64))
    person: Mapped[str] = mapped_column(String(200))
    name: Mapped[str] = mapped_column(String(200))
    approved_at: Mapped[datetime]


class TagRow(Base):
    """A name that stays at its version, and keeps it."""

    __tablename__ = "registry_tags"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    version_id: Mapped[str] = mapped_column(String(64), ForeignKey(_VERSION))
    tagged_at: Mapped[datetime]


class EvaluationRow(Base):
    """One measurement of a version on held-out examples, as canonical JSON: known only after it was published."""

    __tablename__ = "registry_evaluations"
    __table_args__ = (Index("ix_registry_evaluations_version", "version_id"), {"sqlite_autoincrement": True})

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    version_id: Mapped[str] = mapped_column(String(64), ForeignKey(_VERSION))
    run_id: Mapped[str] = mapped_column(String(200))
    metrics: Mapped[str] = mapped_column(Text)
    not_protected: Mapped[str] = mapped_column(Text)
    measured_at: Mapped[datetime]


class DeviceRow(Base):
    """That a device held a version, from its first report to its last."""

    __tablename__ = "registry_devices"
    __table_args__ = (Index("ix_registry_devices_version", "version_id"),)

    device_id: Mapped[str] = mapped_column(String(200), primary_key=True)
    version_id: Mapped[str] = mapped_column(String(64), ForeignKey(_VERSION), primary_key=True)
    first_at: Mapped[datetime]
    last_at: Mapped[datetime]


class AuditRow(Base):
    """One row of the audit log; triggers refuse to change or delete it."""

    __tablename__ = "registry_audit"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[str] = mapped_column(String(40))
    actor: Mapped[str] = mapped_column(String(200))
    action: Mapped[str] = mapped_column(String(40))
    subject: Mapped[str] = mapped_column(String(200))
    details: Mapped[str] = mapped_column(Text)
    previous: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))


class AuditHeadRow(Base):
    """The one row that says where the audit log ends; every writer locks it, so writers queue up."""

    __tablename__ = "registry_audit_head"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64))
