"""Lists of a tenant's files and batches: keyset pages on ``(created_at, id)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from storage.errors import NotFound


def page(
    connection: sa.Connection,
    table: sa.Table,
    where: Sequence[sa.ColumnElement[bool]],
    *,
    tenant: str,
    limit: int,
    after: str | None,
    newest_first: bool = True,
) -> tuple[list[sa.Row[Any]], bool]:
    """One page of a tenant's rows, and whether there are more. ``after``: the id of the last row of the page before.

    Raises :class:`NotFound` for an ``after`` that is no row of the tenant.
    """
    mine = table.c.tenant == tenant
    query = sa.select(table).where(mine, *where)
    if after is not None:
        last = connection.execute(sa.select(table.c.created_at, table.c.id).where(mine, table.c.id == after)).first()
        if last is None:
            raise NotFound(f"there is no {table.name} {after!r} to list after")
        key = sa.tuple_(table.c.created_at, table.c.id)
        bound = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
        query = query.where(key < bound if newest_first else key > bound)
    order = (table.c.created_at, table.c.id)
    query = query.order_by(*(column.desc() if newest_first else column for column in order)).limit(limit + 1)
    rows = list(connection.execute(query))
    return rows[:limit], len(rows) > limit
