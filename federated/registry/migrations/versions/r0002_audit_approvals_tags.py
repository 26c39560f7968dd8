"""Second form: audit log, moves of channels, approvals, tags, evaluations, devices.

Channels keep where they point; what they pointed at before was not recorded in the first form, so their history begins
here. The audit log's first row is written by `federated.registry.upgrades`, in the same transaction.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_FROZEN = "the audit log is append-only"


def upgrade() -> None:
    """Create the tables, and begin each channel's history."""
    op.add_column("registry_versions", sa.Column("adapter_id", sa.String(100), nullable=False, server_default=""))
    op.add_column("registry_versions", sa.Column("release_counter", sa.Integer(), nullable=False, server_default="0"))
    op.create_index("ix_registry_versions_adapter", "registry_versions", ["adapter_id", "release_counter"])
    op.create_index("ix_registry_versions_parent", "registry_versions", ["parent"])
    op.create_index("ix_registry_versions_weights", "registry_versions", ["weights_digest"])
    op.create_index("ix_registry_versions_state", "registry_versions", ["state_digest"])
    op.add_column("registry_channels", sa.Column("move", sa.Integer(), nullable=True))
    _moves()
    op.create_table(
        "registry_policies",
        sa.Column("channel", sa.String(64), nullable=False),
        sa.Column("approvals", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("channel", name="pk_registry_policies"),
    )
    op.create_table(
        "registry_approvals",
        sa.Column("sequence", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("version_id", sa.String(64), nullable=False),
        sa.Column("channel", sa.String(64), nullable=False),
        sa.Column("person", sa.String(200), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("approved_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_registry_approvals"),
        sa.UniqueConstraint("version_id", "channel", "person", name="uq_registry_approvals_version_id"),
        _of_version("registry_approvals"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "registry_tags",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version_id", sa.String(64), nullable=False),
        sa.Column("tagged_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_registry_tags"),
        _of_version("registry_tags"),
    )
    op.create_table(
        "registry_evaluations",
        sa.Column("sequence", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("version_id", sa.String(64), nullable=False),
        sa.Column("run_id", sa.String(200), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("not_protected", sa.Text(), nullable=False),
        sa.Column("measured_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_registry_evaluations"),
        _of_version("registry_evaluations"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_registry_evaluations_version", "registry_evaluations", ["version_id"])
    op.create_table(
        "registry_devices",
        sa.Column("device_id", sa.String(200), nullable=False),
        sa.Column("version_id", sa.String(64), nullable=False),
        sa.Column("first_at", sa.DateTime(), nullable=False),
        sa.Column("last_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("device_id", "version_id", name="pk_registry_devices"),
        _of_version("registry_devices"),
    )
    op.create_index("ix_registry_devices_version", "registry_devices", ["version_id"])
    _audit()


def _of_version(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["version_id"], ["registry_versions.version_id"], name=f"fk_{table}_version_id")


def _moves() -> None:
    op.create_table(
        "registry_moves",
        sa.Column("sequence", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("channel", sa.String(64), nullable=False),
        sa.Column("version_id", sa.String(64), nullable=False),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("moved_at", sa.DateTime(), nullable=False),
        sa.Column("below", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("sequence", name="pk_registry_moves"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_registry_moves_channel", "registry_moves", ["channel"])
    op.execute(
        "INSERT INTO registry_moves (channel, version_id, action, actor, moved_at) "
        "SELECT name, version_id, 'upgrade', '', moved_at FROM registry_channels"
    )
    op.execute(
        "UPDATE registry_channels SET move = "
        "(SELECT sequence FROM registry_moves WHERE registry_moves.channel = registry_channels.name)"
    )


def _audit() -> None:
    op.create_table(
        "registry_audit",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.String(40), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_registry_audit"),
    )
    op.create_table(
        "registry_audit_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_registry_audit_head"),
    )
    dialect = op.get_context().dialect.name
    if dialect == "sqlite":
        for what in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER registry_audit_no_{what.lower()} BEFORE {what} ON registry_audit "
                f"BEGIN SELECT RAISE(ABORT, '{_FROZEN}'); END"
            )
    elif dialect == "postgresql":
        op.execute(
            "CREATE FUNCTION registry_audit_frozen() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{_FROZEN}'; END $$"
        )
        op.execute(
            "CREATE TRIGGER registry_audit_frozen BEFORE UPDATE OR DELETE OR TRUNCATE ON registry_audit "
            "FOR EACH STATEMENT EXECUTE FUNCTION registry_audit_frozen()"
        )
