"""Who works on the database: one row per worker process."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from storage import tables
from storage.database import Database, now
from storage.states import ShardState


@dataclass(frozen=True, slots=True)
class Worker:
    """``pid_started_at`` (Unix seconds, by the worker's host) tells a process from a later one with the same pid."""

    id: str
    host: str
    pid: int
    pid_started_at: float


def register(database: Database, worker: Worker) -> None:
    """Make the worker known, before its first claim."""
    with database.write() as connection:
        connection.execute(
            tables.worker.insert().values(
                id=worker.id,
                host=worker.host,
                pid=worker.pid,
                pid_started_at=worker.pid_started_at,
                started_at=now(),
                heartbeat_at=now(),
            )
        )


def unregister(database: Database, worker_id: str) -> None:
    """Forget a worker that ended politely, or is known to be dead."""
    with database.write() as connection:
        connection.execute(tables.worker.delete().where(tables.worker.c.id == worker_id))


def touch(database: Database, worker_id: str) -> None:
    """Say that the worker is alive."""
    with database.write() as connection:
        connection.execute(tables.worker.update().where(tables.worker.c.id == worker_id).values(heartbeat_at=now()))


def any_alive(database: Database, *, within: float) -> bool:
    """Whether any worker has given a sign of life in the last ``within`` seconds."""
    table = tables.worker
    query = sa.select(table.c.id).where(table.c.heartbeat_at > now() - within).limit(1)
    with database.read() as connection:
        return connection.execute(query).first() is not None


def on_host(database: Database, host: str) -> list[Worker]:
    """The workers that registered from ``host`` and have not ended politely."""
    table = tables.worker
    with database.read() as connection:
        found = connection.execute(sa.select(table).where(table.c.host == host)).all()
    return [Worker(row.id, row.host, row.pid, row.pid_started_at) for row in found]


def holding(database: Database, job_id: str) -> list[str]:
    """Ids of the workers that hold shards of the job, or are publishing it."""
    shard, job = tables.shard, tables.job
    with database.read() as connection:
        owners = connection.execute(
            sa.select(shard.c.lease_owner)
            .where(shard.c.job_id == job_id, shard.c.state == ShardState.RUNNING)
            .union(sa.select(job.c.finalize_owner).where(job.c.id == job_id, job.c.finalize_owner.is_not(None)))
        ).scalars()
        return sorted(str(owner) for owner in owners)
