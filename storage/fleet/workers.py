"""Who works on the database: one row per worker process, kept fresh by its heartbeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from storage.errors import NotFound
from storage.queue import plan_leases
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read, values
from storage.states import ShardState

FORGET_SECONDS = 24 * 3600.0
"""A worker that was silent for this long is struck off. Long enough that somebody sees it in ``worker list``."""
_LATE_LEASES = 10


@dataclass(frozen=True, slots=True)
class Worker:
    """``boot_id`` and ``start_ticks`` tell a process from a later one with the same pid: the host's boot, and the clock
    ticks since that boot at which the process started, so that no clock that is set matters. Where the host does not
    tell them (``None``), ``pid_started_at`` does: Unix seconds, by the worker's host.

    ``queues`` are what it takes shards or control work from, ``slots`` the shards it runs at once (0: control work
    only); both are empty for an embedded run. ``lease_seconds``: how long it may be silent. ``offers``: engine → what
    its machine has that jobs may ask for (execution providers); an engine that is not there says nothing of it.
    """

    id: str
    host: str
    pid: int
    pid_started_at: float
    engines: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    slots: int = 0
    lease_seconds: float = 60.0
    version: str = ""
    boot_id: str | None = None
    start_ticks: int | None = None
    offers: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker as the database knows it. ``silent_seconds``: since its last heartbeat, by the database's clock.

    ``warm``: the engines it has loaded (``key``, ``engine``, ``model``, ``bytes``); ``holds``: ids of its shards.
    ``trouble``: why it gets no work, by its own account. ``dropped_messages``: how many made no sense to it.
    """

    worker: Worker
    started_at: float
    silent_seconds: float
    draining: bool
    warm: tuple[Mapping[str, Any], ...]
    holds: tuple[str, ...]
    trouble: str | None = None
    dropped_messages: int = 0

    @property
    def state(self) -> str:
        """``silent`` (a heartbeat is overdue by more than its lease), ``draining`` or ``alive``."""
        if self.silent_seconds > self.worker.lease_seconds:
            return "silent"
        return "draining" if self.draining else "alive"


def register(database: Database, worker: Worker) -> None:
    """Make the worker known, before its first claim. Again, if it was forgotten, or its row is of an earlier life."""
    with database.write() as connection:
        connection.execute(tables.worker.delete().where(tables.worker.c.id == worker.id))
        connection.execute(tables.worker.insert().values(**values(worker), started_at=now(), heartbeat_at=now()))


def unregister(database: Database, worker_id: str) -> None:
    """Forget a worker that ended politely, or is known to be dead, and free the jobs that it planned or published.

    So no lease of a job has an owner that nobody knows.
    """
    job = tables.job
    with database.write() as connection:
        connection.execute(job.update().where(plan_leases.held_by([worker_id])).values(**plan_leases.FREE))
        connection.execute(tables.worker.delete().where(tables.worker.c.id == worker_id))


def touch(
    database: Database,
    worker_id: str,
    *,
    draining: bool = False,
    warm: Sequence[Mapping[str, Any]] = (),
    trouble: str | None = None,
    dropped_messages: int = 0,
) -> bool | None:
    """Say that the worker is alive, and how it is: see :class:`WorkerStatus`; and whether it is draining by itself.

    Returns whether it is to drain (it said so, or somebody asked for it); ``None`` when nobody knows the worker.
    """
    table = tables.worker
    update = table.update().where(table.c.id == worker_id).returning(table.c.draining)
    update = update.values(heartbeat_at=now(), warm=warm, trouble=trouble, dropped_messages=dropped_messages)
    if draining:
        update = update.values(draining=True)
    with database.write() as connection:
        found = connection.execute(update).first()
    return None if found is None else bool(found.draining)


def drain(database: Database, worker_ids: Sequence[str]) -> list[str]:
    """Ask workers to drain; returns the ids of those that are known.

    Each sees it at its next heartbeat. Nothing is taken from it: its leases stay as they are.
    """
    table = tables.worker
    update = table.update().where(table.c.id.in_(worker_ids)).values(draining=True).returning(table.c.id)
    with database.write() as connection:
        return sorted(connection.execute(update).scalars())


def find(database: Database, id_or_part: str) -> str:
    """The id of the one worker whose id is, or contains, this. Raises :class:`NotFound` for none, or for several."""
    table = tables.worker
    ids: list[str] = sorted(database.scalars(sa.select(table.c.id)))
    if id_or_part in ids:
        return id_or_part
    found = [worker_id for worker_id in ids if id_or_part and id_or_part in worker_id]
    if len(found) != 1:
        why = f"several: {', '.join(found)}" if found else "see 'rowmill worker list'"
        raise NotFound(f"no one worker is {id_or_part!r}; {why}")
    return found[0]


def listed(database: Database) -> list[WorkerStatus]:
    """Every worker that is known, by host and start, with the shards that it holds."""
    table, shard = tables.worker, tables.shard
    with database.read() as connection:
        found = connection.execute(
            sa.select(table, (now() - table.c.heartbeat_at).label("silent")).order_by(table.c.host, table.c.started_at)
        ).all()
        held = connection.execute(
            sa.select(shard.c.lease_owner, shard.c.id).where(shard.c.state == ShardState.RUNNING).order_by(shard.c.id)
        ).all()
    return [
        WorkerStatus(
            worker=_worker(row),
            started_at=row.started_at,
            silent_seconds=max(0.0, row.silent),
            draining=row.draining,
            warm=tuple(row.warm),
            holds=tuple(item.id for item in held if item.lease_owner == row.id),
            trouble=row.trouble,
            dropped_messages=row.dropped_messages,
        )
        for row in found
    ]


def forget_silent(database: Database, *, after: float = FORGET_SECONDS) -> int:
    """Strike off workers that were silent for ``after`` seconds and hold nothing; returns how many."""
    table, shard = tables.worker, tables.shard
    holds = sa.exists().where(shard.c.lease_owner == table.c.id, shard.c.state == ShardState.RUNNING)
    gone = table.delete().where(table.c.heartbeat_at < now() - after, ~holds)
    return database.change(gone)


def free_slots(database: Database, queue: str) -> int:
    """How many more shards of ``queue`` the workers could run now: more wake-ups than that are of no use.

    A slot that is taken wakes its successor itself. 0 without a worker: one that starts later asks for itself.
    """
    return sum(
        max(0, seen.worker.slots - len(seen.holds))
        for seen in listed(database)
        if queue in seen.worker.queues
        and not seen.draining
        # One that is merely late must not be left asleep; a wake-up for a dead one does no harm.
        and seen.silent_seconds <= _LATE_LEASES * seen.worker.lease_seconds
    )


def any_alive(database: Database, *, within: float) -> bool:
    """Whether any worker has given a sign of life in the last ``within`` seconds."""
    table = tables.worker
    query = sa.select(table.c.id).where(table.c.heartbeat_at > now() - within).limit(1)
    return database.row(query) is not None


def on_host(database: Database, host: str) -> list[Worker]:
    """The workers that registered from ``host`` and have not ended politely."""
    table = tables.worker
    return [
        _worker(row) for row in database.rows(sa.select(table).where(table.c.host == host).order_by(table.c.started_at))
    ]


def _worker(row: sa.Row[Any]) -> Worker:
    offers = {name: tuple(items) for name, items in row.offers.items()}
    return read(Worker, row, engines=tuple(row.engines), queues=tuple(row.queues), offers=offers)


@dataclass(frozen=True, slots=True)
class Holder:
    """A registered worker that has a job to itself, or shards of it, until ``until`` (Unix seconds) if it renews no
    more; that is in ``seconds`` by the database's clock."""

    worker: Worker
    until: float
    seconds: float


def holders(database: Database, job_id: str) -> list[Holder]:
    """Who works on the job: runs shards of it, plans or publishes it, under a lease that has not run out.

    What an owner that is not registered holds does not count: workers register before they claim, and are struck off
    when they have ended.
    """
    shard, job = tables.shard.c, tables.job.c
    leases = (
        sa.select(shard.lease_owner.label("owner"), shard.lease_until.label("until"))
        .where(shard.job_id == job_id, shard.state == ShardState.RUNNING, shard.lease_until > now())
        .union(
            sa.select(job.finalize_owner, job.finalize_until).where(
                job.id == job_id, job.finalize_owner.is_not(None), job.finalize_until > now()
            )
        )
    )
    with database.read() as connection:
        clock = connection.execute(sa.select(now())).scalar_one()
        until: dict[str, float] = {}
        for lease in connection.execute(leases):
            owner = plan_leases.worker_of(lease.owner)
            until[owner] = max(lease.until, until.get(owner, 0.0))
        found = connection.execute(sa.select(tables.worker).where(tables.worker.c.id.in_(until))).all()
    return [Holder(_worker(row), until[row.id], until[row.id] - clock) for row in sorted(found, key=lambda row: row.id)]


def unknown_owners(database: Database) -> list[str]:
    """Owners of running shards that are not registered, and so have ended."""
    shard, worker = tables.shard, tables.worker
    query = (
        sa.select(shard.c.lease_owner)
        .where(shard.c.state == ShardState.RUNNING, ~sa.exists().where(worker.c.id == shard.c.lease_owner))
        .distinct()
    )
    return sorted(database.scalars(query))
