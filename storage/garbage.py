"""Objects that may be deleted, and when. Nothing is deleted that is not in this queue."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from storage import tables
from storage.database import Database, now


def enqueue(database: Database, prefixes: Iterable[str], *, delay: float) -> None:
    """Queue object prefixes for deletion in ``delay`` seconds. A prefix that is queued already keeps its time."""
    insert = sqlite.insert if database.sqlite else postgresql.insert
    with database.write() as connection:
        for uri in prefixes:
            statement = insert(tables.gc_queue).values(uri=uri, not_before=now() + delay)
            connection.execute(statement.on_conflict_do_nothing())


def due(database: Database, *, limit: int = 100) -> list[str]:
    """Prefixes whose time has come, longest due first."""
    table = tables.gc_queue
    query = sa.select(table.c.uri).where(table.c.not_before <= now()).order_by(table.c.not_before).limit(limit)
    with database.read() as connection:
        return list(connection.execute(query).scalars())


def forget(database: Database, uri: str) -> None:
    """Take a prefix off the queue, after it was deleted."""
    with database.write() as connection:
        connection.execute(tables.gc_queue.delete().where(tables.gc_queue.c.uri == uri))
