"""Whose jobs these are: shares, caps and quotas, one row per tenant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage.errors import Conflict, InvalidJob, NotFound
from storage.sql import tables, upsert
from storage.sql.database import Database, now, today
from storage.sql.row_mapping import read
from storage.states import TERMINAL_JOB, ShardState

LIMITS = ("max_running", "max_jobs", "rows_per_day", "tokens_per_day")
"""The columns that may be ``None``: no limit."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST = {"max_running": 2**31 - 1, "max_jobs": 2**31 - 1, "rows_per_day": 2**63 - 1, "tokens_per_day": 2**63 - 1}


@dataclass(frozen=True, slots=True)
class Tenant:
    """``weight`` is its share against other tenants' while they compete; ``None`` is no limit.

    ``max_running`` shards run at a time, ``max_jobs`` jobs are live at a time; rows and tokens go by UTC days.
    """

    name: str
    weight: float
    max_running: int | None
    max_jobs: int | None
    rows_per_day: int | None
    tokens_per_day: int | None
    created_at: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant uses now: live jobs, running shards, rows and tokens since 00:00 UTC by the database's clock."""

    jobs: int
    running: int
    rows_today: int
    tokens_today: int


def check_name(name: str) -> None:
    """Raise :class:`InvalidJob` for what cannot be the name of a tenant."""
    if not _NAME.fullmatch(name):
        raise InvalidJob(f"a name has 1 to 64 letters, digits, and _ . -; not {name!r}", field="tenant")


def add(database: Database, name: str, **values: Any) -> Tenant:
    """Register a tenant. Raises :class:`Conflict` when it is there already; values are those of :class:`Tenant`."""
    check_name(name)
    _check(values)
    try:
        database.change(tables.tenant.insert().values(name=name, created_at=now(), **values))
    except IntegrityError:
        raise Conflict(f"there is a tenant {name!r} already; 'rowmill tenant set' changes it", field="tenant") from None
    return get(database, name)


def change(database: Database, name: str, **values: Any) -> Tenant:
    """Set some of the values; what runs or is queued already is left alone. Raises :class:`NotFound`."""
    _check(values)
    table = tables.tenant
    # The name too, so that nothing to change is a change as well.
    if database.change(table.update().where(table.c.name == name).values(name=name, **values)) != 1:
        raise _unknown(name)
    return get(database, name)


def remove(database: Database, name: str) -> None:
    """Forget a tenant and what it has used, and end its API keys. Its ended jobs stay.

    Raises :class:`Conflict` while it has live jobs.
    """
    with database.write() as connection:
        if _locked(database, connection, name) is None:
            raise _unknown(name)
        live = live_jobs(connection, name)
        if live:
            raise Conflict(f"tenant {name!r} has {live} live jobs; wait for them or cancel them first", field="tenant")
        for table, column in (
            (tables.tenant_usage, "tenant"),
            (tables.tenant_share, "tenant"),
            (tables.tenant, "name"),
        ):
            connection.execute(table.delete().where(table.c[column] == name))
        # A tenant that gets the name later must not be reached by them.
        key = tables.api_key
        connection.execute(
            key.update().where(key.c.tenant == name, key.c.revoked_at.is_(None)).values(revoked_at=now())
        )


def get(database: Database, name: str) -> Tenant:
    """The tenant, or :class:`NotFound`."""
    found = database.record(Tenant, sa.select(tables.tenant).where(tables.tenant.c.name == name))
    if found is None:
        raise _unknown(name)
    return found


def listed(database: Database) -> list[Tenant]:
    """All tenants by name."""
    return database.records(Tenant, sa.select(tables.tenant).order_by(tables.tenant.c.name))


def usage(database: Database, name: str) -> Usage:
    """What the tenant uses now; all zero for one that is not known."""
    table, shard = tables.tenant_usage, tables.shard
    with database.read() as connection:
        day = connection.execute(
            sa.select(table.c.rows, table.c.tokens).where(table.c.tenant == name, table.c.day == today())
        ).first()
        running = connection.execute(
            sa.select(sa.func.count())
            .select_from(shard)
            .where(shard.c.state == sa.literal_column(f"'{ShardState.RUNNING}'"), shard.c.tenant == name)
        ).scalar_one()
        jobs = live_jobs(connection, name)
    return Usage(jobs, int(running), int(day.rows) if day else 0, int(day.tokens) if day else 0)


def live_jobs(connection: sa.Connection, name: str) -> int:
    """How many of the tenant's jobs have not ended."""
    job = tables.job
    ended: list[sa.ColumnElement[str]] = [
        sa.literal_column(f"'{state}'") for state in sorted(TERMINAL_JOB)
    ]  # as the partial index has them
    query = sa.select(sa.func.count()).select_from(job).where(job.c.tenant == name, job.c.state.not_in(ended))
    return int(connection.execute(query).scalar_one())


def known(database: Database, connection: sa.Connection, name: str, *, create: bool) -> Tenant:
    """The tenant, its row locked until the transaction ends; made with the defaults if it is unknown and ``create``.

    Raises :class:`InvalidJob` for one that is unknown otherwise. Locked after jobs and shards, never before.
    """
    row = _locked(database, connection, name)
    if row is None:
        if not create:
            raise InvalidJob(
                f"there is no tenant {name!r}, and unknown ones are refused here; an operator registers it with "
                f"'rowmill tenant add {name}'",
                field="tenant",
            )
        new = upsert.insert(connection, tables.tenant).values(name=name, created_at=now())
        connection.execute(new.on_conflict_do_nothing())
        row = _locked(database, connection, name)
        assert row is not None
    return read(Tenant, row)


def _locked(database: Database, connection: sa.Connection, name: str) -> sa.Row[Any] | None:
    return connection.execute(database.locked(sa.select(tables.tenant).where(tables.tenant.c.name == name))).first()


def _check(values: dict[str, Any]) -> None:
    unknown = sorted(set(values) - {"weight", *LIMITS})
    if unknown:
        raise InvalidJob(f"a tenant has no {', '.join(unknown)}; it has weight, {', '.join(LIMITS)}", field=unknown[0])
    weight = values.get("weight", 1.0)
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not 0.001 <= weight <= 1000.0:
        raise InvalidJob(f"a weight is a number between 0.001 and 1000, not {weight!r}", field="weight")
    for name in LIMITS:
        limit = values.get(name)
        if limit is not None and not 0 <= limit <= _MOST[name]:
            raise InvalidJob(f"a limit is a number from 0 to {_MOST[name]:,}, or none; not {limit:,}", field=name)


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no tenant {name!r}; 'rowmill tenant list' shows those there are")
