"""Which processes have taken on which jobs, from before the first claim to the end: what leases alone do not tell."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from storage.queue import plan_leases
from storage.sql import tables
from storage.sql.database import Database
from storage.states import ShardState

_table = tables.attendance


def attend(database: Database, worker_id: str, job_id: str) -> None:
    """A registered worker takes the job on. What is left of processes that have ended since is forgotten."""
    worker = tables.worker.c
    with database.write() as connection:
        connection.execute(
            _table.delete().where(
                _table.c.job_id == job_id,
                sa.or_(_table.c.worker_id == worker_id, ~sa.exists().where(worker.id == _table.c.worker_id)),
            )
        )
        connection.execute(_table.insert().values(worker_id=worker_id, job_id=job_id))


def leave(database: Database, worker_id: str, job_id: str) -> None:
    """The worker is done with the job, whether the job has ended or not."""
    database.change(_table.delete().where(_table.c.worker_id == worker_id, _table.c.job_id == job_id))


def attendants(database: Database, job_ids: Collection[str]) -> dict[str, set[str]]:
    """For each of the jobs the ids of the workers that have taken it on, or hold shards of it, or publish it.

    Dead ones are among them: a process that was killed leaves its mark behind.
    """
    shard, job = tables.shard.c, tables.job.c
    running = sa.select(shard.job_id, shard.lease_owner).where(shard.state == ShardState.RUNNING)
    query = sa.union(
        sa.select(_table.c.job_id, _table.c.worker_id.label("worker_id")).where(_table.c.job_id.in_(job_ids)),
        running.where(shard.job_id.in_(job_ids)),
        sa.select(job.id, job.finalize_owner).where(job.id.in_(job_ids), job.finalize_owner.is_not(None)),
    )
    found: dict[str, set[str]] = {job_id: set() for job_id in job_ids}
    for job_id, owner in database.rows(query):
        found[job_id].add(plan_leases.worker_of(owner))
    return found
