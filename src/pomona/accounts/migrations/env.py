"""Alembic's entry point: runs on the connection and in the transaction that ``accounts.database`` has opened."""

from alembic import context

from pomona.accounts.tables import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
context.run_migrations()
