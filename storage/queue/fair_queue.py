"""Which shard a claim takes: highest priority, fair share between tenants, a warm engine, longest due.

Ready shards that are alike in queue, priority, tenant and engine make a *flow*; within one, the longest due comes
first. A claim reads the front of every flow by one look-up each in ``ix_shard_ready``, so that its cost grows with the
flows and not with the shards.

Fair share is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), without a queue of arrivals: a tenant's
claim starts at ``max(vtime, V)`` and ends ``rows / weight`` later, which is its next ``vtime``; the least start goes
first. V, the virtual time, is the highest start at which anybody was served (``vstart``). Whoever was idle, or was held
back by ``max_running``, begins at V and so has hoarded nothing. Each queue and priority keeps its own V
(``tenant_share``). A shared V would be pushed up by tenants of a busy queue; everyone in a quiet queue would then start
at V, and fair share there would be lost. Where a claim may choose between queues, a tenant counts by how far it is
ahead of the first in its own queue. Only a claim that somebody else was waiting for is charged: a tenant alone writes
nothing at all.

An engine may take minutes to load, and turns that alternate between two models would do little else. So a worker
stays with an engine that it has just loaded until the loading has paid off (``sticky_keys``); what its tenant gets
beyond its turn is charged like everything else, and the others catch up afterwards.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from storage.sql import tables, upsert
from storage.sql.column_types import Text
from storage.sql.database import Database, now
from storage.sql.row_mapping import read
from storage.states import JobState, ShardState

AFFINITY_SECONDS = 300.0
"""How long a shard may be passed over for those of the same tenant whose engine is warm. After that it goes first."""
_FRONT = 8
"""Flows tried before all of them are asked for: the first is taken unless other claimers hold what is left in it."""

_READY: sa.ColumnClause[str] = sa.literal_column(f"'{ShardState.READY}'")
_RUNNING: sa.ColumnClause[str] = sa.literal_column(f"'{ShardState.RUNNING}'")
"""Literals, so that a prepared statement can use the partial indexes."""
_CLAIMABLE = (JobState.QUEUED, JobState.IN_PROGRESS)


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow with a shard that is due, of a tenant that may have one more running.

    ``start`` is where the claim starts in virtual time, ``floor`` the least start of its queue and priority.
    ``contested``: another tenant waits there as well. ``capped``: the tenant has a ``max_running``.
    """

    queue: str
    priority: int
    tenant: str
    engine_key: str
    start: float
    floor: float
    contested: bool
    capped: bool


def next_shard(
    database: Database,
    connection: sa.Connection,
    *,
    queues: Collection[str] | None,
    warm: Collection[str],
    sticky_keys: Collection[str] = (),
) -> tuple[sa.Row[Any], Flow] | None:
    """The row of the shard to claim, locked, and its flow; ``None`` when nothing may be claimed now.

    ``queues`` are those to serve (``None``: all), ``warm`` the keys of the engines that are loaded here,
    ``sticky_keys`` of those whose loading has not paid off yet: their flows go before another tenant's turn.
    """
    shard = tables.shard
    for limit in (_FRONT, None):
        found = due_flows(connection, queues=queues, warm=warm, sticky_keys=sticky_keys, limit=limit)
        for flow in found:
            row = _take(
                database,
                connection,
                flow.tenant if flow.capped else None,
                shard.c.queue == flow.queue,
                shard.c.priority == flow.priority,
                shard.c.tenant == flow.tenant,
                shard.c.engine_key == flow.engine_key,
            )
            if row is not None:
                return row, flow
        if limit is None or len(found) < limit:
            return None
    return None


def next_of_job(
    database: Database, connection: sa.Connection, job_id: str, queues: Collection[str] | None = None
) -> sa.Row[Any] | None:
    """The row of the job's next shard, locked; ``None`` when none is due or its tenant has enough running."""
    job, tenant = tables.job, tables.tenant
    capped = connection.execute(
        sa.select(tenant.c.name)
        .join(job, job.c.tenant == tenant.c.name)
        .where(job.c.id == job_id, tenant.c.max_running.is_not(None))
    ).scalar()
    where = [tables.shard.c.job_id == job_id]
    if queues is not None:
        where.append(tables.shard.c.queue.in_(queues))
    return _take(database, connection, capped, *where)


def charge(connection: sa.Connection, flow: Flow, rows: int) -> None:
    """Move the tenant on by the ``rows`` it was given, if others waited. The claim's last statement.

    So claimers of one tenant wait for each other's COMMIT at most.
    """
    if not flow.contested:
        return
    share, tenant = tables.tenant_share, tables.tenant
    cost = sa.cast(max(1, rows), sa.Double()) / tenant.c.weight
    first = sa.select(
        tenant.c.name,
        sa.literal(flow.queue, Text()),
        sa.literal(flow.priority, sa.Integer()),
        sa.literal(flow.start, sa.Double()) + cost,
        sa.literal(flow.floor, sa.Double()),
    ).where(tenant.c.name == flow.tenant)
    columns = [share.c.tenant, share.c.queue, share.c.priority, share.c.vtime, share.c.vstart]
    statement = upsert.insert(connection, share).from_select(columns, first)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[share.c.queue, share.c.priority, share.c.tenant],
            set_={
                "vtime": _greatest(share.c.vtime, flow.start)
                + sa.select(cost).where(tenant.c.name == flow.tenant).scalar_subquery(),
                "vstart": _greatest(share.c.vstart, flow.floor),
            },
        )
    )


def _greatest(column: sa.Column[float], value: float) -> sa.Case[float]:
    return sa.case((column > value, column), else_=value)


def _take(
    database: Database, connection: sa.Connection, capped: str | None, *where: sa.ColumnElement[bool]
) -> sa.Row[Any] | None:
    """The first due shard among those ``where``, locked, unless the ``capped`` tenant has enough of them running."""
    shard, job = tables.shard, tables.job
    query = (
        sa.select(shard)
        # The clock in a subquery is read once, and is then a bound of the index scan: what is not due is not read.
        .where(shard.c.state == _READY, shard.c.run_after <= sa.select(now()).scalar_subquery(), *where)
        .where(sa.exists().where(job.c.id == shard.c.job_id, job.c.state.in_(_CLAIMABLE)))
        .order_by(shard.c.priority.desc(), shard.c.run_after, shard.c.id)
        .limit(1)
    )
    query = database.locked(query, skip=True)
    if capped is None:
        return connection.execute(query).first()
    # Claimers of a capped tenant take turns, so that its cap is exact. Going back to the savepoint lets the tenant go:
    # nobody waits for one tenant while holding another.
    savepoint = connection.begin_nested()
    row = connection.execute(query).first() if _has_room(database, connection, capped) else None
    if row is None:
        savepoint.rollback()
    else:
        savepoint.commit()
    return row


def _has_room(database: Database, connection: sa.Connection, name: str) -> bool:
    tenant = tables.tenant
    query = sa.select(tenant.c.max_running).where(tenant.c.name == name)
    limit: int | None = connection.execute(database.locked(query)).scalar()
    if limit is None:
        return True
    # A statement of its own: it sees what those have committed that were waited for.
    return int(connection.execute(sa.select(_running(sa.literal(name)))).scalar_one()) < limit


def _running(name: sa.ColumnElement[str]) -> sa.ScalarSelect[int]:
    shard = tables.shard.alias("r")
    query = sa.select(sa.func.count()).select_from(shard)
    return query.where(shard.c.state == _RUNNING, shard.c.tenant == name).scalar_subquery()


def due_flows(
    connection: sa.Connection,
    *,
    queues: Collection[str] | None,
    warm: Collection[str],
    sticky_keys: Collection[str] = (),
    limit: int | None = None,
) -> list[Flow]:
    """The flows that may be claimed from, best first, at most ``limit`` of them."""
    if queues is not None and not queues:
        return []
    names = {f"queue_{number}": queue for number, queue in enumerate(sorted(set(queues or ())))}
    values: dict[str, Any] = {
        **names,
        "warm": sorted(warm),
        "sticky": sorted(sticky_keys),
        "affinity": AFFINITY_SECONDS,
    }
    if limit is not None:
        values["front"] = limit
    query = _flows_query(None if queues is None else len(names), limit is not None)
    found = connection.execute(query, values).all()
    return [
        read(Flow, row, contested=row.first_tenant != row.last_tenant, capped=row.max_running is not None)
        for row in found
    ]


@lru_cache(maxsize=64)
def _flows_query(n_queues: int | None, limited: bool) -> sa.Select[Any]:
    flow, tenant, share = _fronts(n_queues), tables.tenant, tables.tenant_share
    clock = sa.select(now()).scalar_subquery()
    stood = sa.select(share.c.queue, share.c.priority, sa.func.max(share.c.vstart).label("vstart"))
    stands = stood.group_by(share.c.queue, share.c.priority).subquery("virtual")
    virtual = sa.func.coalesce(stands.c.vstart, 0.0)
    vtime = sa.func.coalesce(share.c.vtime, 0.0)
    start = sa.case((vtime > virtual, vtime), else_=virtual)
    same = [flow.c.queue, flow.c.priority]
    rank = sa.case(
        (flow.c.run_after < clock - sa.bindparam("affinity", type_=sa.Double()), 0),
        (flow.c.engine_key.in_(sa.bindparam("warm", expanding=True)), 1),
        else_=2,
    )
    sticky = sa.case((flow.c.engine_key.in_(sa.bindparam("sticky", expanding=True)), 0), else_=1)
    due = (
        sa.select(
            flow,
            start.label("start"),
            sa.func.min(start).over(partition_by=same).label("floor"),
            sticky.label("sticky"),
            rank.label("rank"),
            tenant.c.max_running,
            sa.func.min(flow.c.tenant).over(partition_by=same).label("first_tenant"),
            sa.func.max(flow.c.tenant).over(partition_by=same).label("last_tenant"),
        )
        .select_from(
            flow.outerjoin(tenant, tenant.c.name == flow.c.tenant)
            .outerjoin(
                share,
                sa.and_(
                    share.c.queue == flow.c.queue,
                    share.c.priority == flow.c.priority,
                    share.c.tenant == flow.c.tenant,
                ),
            )
            .outerjoin(stands, sa.and_(stands.c.queue == flow.c.queue, stands.c.priority == flow.c.priority))
        )
        .where(flow.c.run_after <= clock)
        .where(sa.or_(tenant.c.max_running.is_(None), _running(flow.c.tenant) < tenant.c.max_running))
        .subquery("due")
    )
    ahead = due.c.start - due.c.floor
    order = (due.c.priority.desc(), due.c.sticky, ahead, due.c.rank, due.c.run_after, due.c.id)
    query = sa.select(due).order_by(*order)
    return query.limit(sa.bindparam("front", type_=sa.Integer())) if limited else query


def _fronts(n_queues: int | None) -> sa.CTE:
    """The first shard of every flow of the queues, by hopping over the index (a loose index scan)."""
    job, here = tables.job, tables.shard.alias("s")
    if n_queues is None:
        asked = sa.select(job.c.queue.label("queue")).where(job.c.state.in_(_CLAIMABLE)).distinct().subquery("asked")
    else:
        each = [sa.select(sa.bindparam(f"queue_{n}", type_=Text()).label("queue")) for n in range(n_queues)]
        asked = (sa.union_all(*each) if len(each) > 1 else each[0]).subquery("asked")
    columns = (here.c.id, here.c.queue, here.c.priority, here.c.tenant, here.c.engine_key, here.c.run_after)
    first = sa.select(*columns).join_from(asked, here, here.c.id == _first_id(asked.c.queue))
    flows = first.cte("flow", recursive=True)
    after = sa.select(*columns).join_from(flows, here, here.c.id == _first_id(flows.c.queue, flows))
    return flows.union_all(after)


def _first_id(queue: sa.ColumnElement[str], after: sa.CTE | None = None) -> sa.ScalarSelect[str]:
    shard = tables.shard.alias("n")
    flow = (shard.c.priority, shard.c.tenant, shard.c.engine_key)
    query = sa.select(shard.c.id).where(shard.c.state == _READY)
    if after is None:
        # Not "=": after an ANALYZE of a small table SQLite would then make an index of its own, for each query.
        query = query.where(shard.c.queue.between(queue, queue))
    else:
        query = query.where(shard.c.queue == queue)
        # Made so that SQLite (3.40) seeks past the flow instead of reading through it: it compares rows by the whole
        # index only where the right side has no affinity (expressions, not columns), and begins at equal ones.
        nothing = sa.literal_column("''", sa.Text())
        never: sa.ColumnClause[float] = sa.literal_column("1e300", sa.Double())
        last = (after.c.priority + sa.literal_column("0"), after.c.tenant + nothing, after.c.engine_key + nothing)
        query = query.where(sa.tuple_(*flow, shard.c.run_after) > sa.tuple_(*last, never))
    return query.order_by(shard.c.queue, *flow, shard.c.run_after, shard.c.id).limit(1).scalar_subquery()
