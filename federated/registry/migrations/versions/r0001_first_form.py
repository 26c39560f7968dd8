"""First form: versions and channels.

There is no way down: a downgrade would delete published versions. Restore a backup instead.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "registry_versions",
        sa.Column("sequence", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("version_id", sa.String(64), nullable=False),
        sa.Column("run_id", sa.String(200), nullable=False),
        sa.Column("round_number", sa.Integer(), nullable=False),
        sa.Column("parent", sa.String(64), nullable=True),
        sa.Column("base_digest", sa.String(200), nullable=False),
        sa.Column("weights_digest", sa.String(64), nullable=False),
        sa.Column("state_digest", sa.String(64), nullable=True),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_registry_versions"),
        sa.UniqueConstraint("version_id", name="uq_registry_versions_version_id"),
        sa.ForeignKeyConstraint(
            ["parent"], ["registry_versions.version_id"], name="fk_registry_versions_parent"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_registry_versions_run", "registry_versions", ["run_id", "round_number"])
    op.create_table(
        "registry_channels",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version_id", sa.String(64), nullable=False),
        sa.Column("moved_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_registry_channels"),
        sa.ForeignKeyConstraint(
            ["version_id"], ["registry_versions.version_id"], name="fk_registry_channels_version_id"
        ),
    )
