"""Alembic's entry: runs inside the connection that ``storage.sql.database`` hands over."""

from __future__ import annotations

from alembic import context

from storage.sql.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    compare_type=True,
    compare_server_default=True,
)
context.run_migrations()
