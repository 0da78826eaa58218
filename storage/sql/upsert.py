"""``INSERT … ON CONFLICT``, which SQLAlchemy has for each database separately."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite


def insert(connection: sa.Connection, table: sa.Table) -> Any:
    """An insert with ``on_conflict_do_nothing`` and ``on_conflict_do_update``, for the connection's database."""
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)
