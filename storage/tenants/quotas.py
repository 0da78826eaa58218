"""What a tenant may use: checked when a job is submitted and when its rows are known, counted as it goes.

Rows are counted when a job is planned, tokens when a shard commits: each in the transaction that moves the job's own
counters, so that neither can be counted twice or not at all.
"""

from __future__ import annotations

import sqlalchemy as sa

from storage.errors import QuotaExceeded
from storage.sql import tables, upsert
from storage.sql.database import Database, today
from storage.tenants import tenants
from storage.tenants.tenants import Tenant

_DAY = 86400.0


def admit_job(database: Database, connection: sa.Connection, name: str, *, create: bool) -> None:
    """Let the tenant have the job that this transaction has just made live, or raise :class:`QuotaExceeded`.

    Tokens and rows that are spent refuse every further job, whatever its size. Raises
    :class:`~storage.errors.InvalidJob` for an unknown tenant unless ``create``.
    """
    tenant = tenants.known(database, connection, name, create=create)
    if tenant.max_jobs is not None:
        others = tenants.live_jobs(connection, name) - 1
        if others >= tenant.max_jobs:
            raise QuotaExceeded(name, "max_jobs", used=others, limit=tenant.max_jobs)
    day, rows, tokens = _used(connection, tenant)
    for quota, used, limit in (
        ("rows_per_day", rows, tenant.rows_per_day),
        ("tokens_per_day", tokens, tenant.tokens_per_day),
    ):
        if limit is not None and used >= limit:
            raise QuotaExceeded(name, quota, used=used, limit=limit, resets_at=(day + 1) * _DAY)


def admit_rows(database: Database, connection: sa.Connection, name: str, rows: int) -> None:
    """Count the rows of a job that was just planned, or raise :class:`QuotaExceeded` when they are too many today."""
    tenant = tenants.known(database, connection, name, create=True)
    if tenant.rows_per_day is not None:
        day, used, _ = _used(connection, tenant)
        if used + rows > tenant.rows_per_day:
            limit = tenant.rows_per_day
            raise QuotaExceeded(name, "rows_per_day", used=used, limit=limit, asked=rows, resets_at=(day + 1) * _DAY)
    count(connection, name, rows=rows)


def count(connection: sa.Connection, name: str, *, rows: int = 0, tokens: int = 0) -> None:
    """Add to what the tenant has used today."""
    if not rows and not tokens:
        return
    table = tables.tenant_usage
    new = upsert.insert(connection, table).values(tenant=name, day=today(), rows=rows, tokens=tokens)
    added = {"rows": table.c.rows + new.excluded.rows, "tokens": table.c.tokens + new.excluded.tokens}
    connection.execute(new.on_conflict_do_update(index_elements=["tenant", "day"], set_=added))


def _used(connection: sa.Connection, tenant: Tenant) -> tuple[int, int, int]:
    """Today's number, and the rows and tokens used today."""
    if tenant.rows_per_day is None and tenant.tokens_per_day is None:
        return 0, 0, 0
    table = tables.tenant_usage
    found = connection.execute(
        sa.select(today().label("today"), table.c.rows, table.c.tokens)
        .select_from(tables.tenant)
        .outerjoin(table, sa.and_(table.c.tenant == tables.tenant.c.name, table.c.day == today()))
        .where(tables.tenant.c.name == tenant.name)
    ).one()
    return int(found.today), int(found.rows or 0), int(found.tokens or 0)
