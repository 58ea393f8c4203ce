"""Alembic's entry: runs on the connection that :meth:`aiida_marketplace_hpc.gateway.ledger.Ledger.migrate` opened."""

from __future__ import annotations

from alembic import context

from aiida_marketplace_hpc.gateway.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
