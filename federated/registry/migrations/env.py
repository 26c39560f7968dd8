"""Alembic's entry point: migrates the connection that `federated.registry.database` hands over, and nothing else.

There is no offline mode and no ini file; the caller owns the connection and its transaction.
"""

from alembic import context

from federated.registry.schema import SCHEMA_TABLE, Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=SCHEMA_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
