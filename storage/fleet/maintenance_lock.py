"""When there was last a round of maintenance, by the database's clock."""

from __future__ import annotations

import sqlalchemy as sa

from storage.sql import tables, upsert
from storage.sql.database import Database, now

_MAINTENANCE = "maintenance"


def take(database: Database, *, every: float) -> bool:
    """Whether it is time for a round: none has begun in the last ``every`` seconds. True for one of those who ask.

    One statement, whatever the answer, so that wake-ups which have piled up cost little.
    """
    table = tables.tick
    # A round in the future is one of before the clock was set back.
    due = sa.or_(table.c.at <= now() - every, table.c.at > now())
    with database.write() as connection:
        statement = (
            upsert.insert(connection, table)
            .values(name=_MAINTENANCE, at=now())
            .on_conflict_do_update(index_elements=[table.c.name], set_={"at": now()}, where=due)
        )
        return connection.execute(statement.returning(table.c.name)).first() is not None
