"""Updates a job when its shards end: the counts, the move to finalizing after the last one, the limit of failed rows.

The job's row is locked before any of its shards' rows (see :func:`locked_job`).
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from storage.errors import LeaseLost
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.transitions import move_job
from storage.states import JobState
from storage.tenants import quotas


def locked_job(database: Database, connection: sa.Connection, job_id: str) -> sa.Row[Any]:
    """The job's row, locked until the transaction ends: always before any of its shards.

    Raises :class:`LeaseLost` when it was deleted: it had ended, so that whoever still works on it is too late.
    """
    row = connection.execute(database.locked(sa.select(tables.job).where(tables.job.c.id == job_id))).first()
    if row is None:
        raise LeaseLost(f"job {job_id} was deleted")
    return row


def close_shard(
    connection: sa.Connection,
    job: sa.Row[Any],
    actor: str,
    *,
    committed: sa.Row[Any] | None = None,
    failed: bool = False,
) -> JobState:
    """Count one shard of the locked ``job`` as ended; the last one moves the job on. Returns the job's state."""
    table = tables.job
    values: dict[str, Any] = {"n_open": table.c.n_open - 1}
    if failed:
        values["n_failed_shards"] = table.c.n_failed_shards + 1
    rows_failed = job.rows_failed
    if committed is not None:
        values |= {
            "rows_done": table.c.rows_done + committed.n_done,
            "rows_failed": table.c.rows_failed + committed.n_failed,
            **{name: table.c[name] + getattr(committed, name) for name in tables.TOKENS},
        }
        rows_failed += committed.n_failed
        # A row that the commits of all jobs of the tenant change: locked last, and for no longer than their own.
        quotas.count(connection, job.tenant, tokens=committed.prompt_tokens + committed.completion_tokens)
    connection.execute(table.update().where(table.c.id == job.id).values(**values))
    state: JobState = job.state
    if state is JobState.QUEUED:
        # The claim found the job locked and left it; it has certainly started by now.
        move_job(connection, job.id, state, JobState.IN_PROGRESS, actor, started_at=now())
        state = JobState.IN_PROGRESS
    if state is JobState.IN_PROGRESS and job.max_failed_rows is not None and rows_failed > job.max_failed_rows:
        stop_for_failed_rows(connection, job.id, state, actor, rows_failed, job.max_failed_rows)
        return JobState.CANCELLING
    if state is JobState.IN_PROGRESS and job.n_open == 1:
        move_job(connection, job.id, state, JobState.FINALIZING, actor)
        return JobState.FINALIZING
    return state


def fail_whole(connection: sa.Connection, job: sa.Row[Any], error: str, actor: str) -> None:
    """Move the locked ``job`` to ``cancelling`` because it failed, unless it is there. The finalizer makes it
    ``failed``."""
    if (state := job.state) in (JobState.QUEUED, JobState.IN_PROGRESS):
        data = {"reason": "failed", "error": error}
        move_job(connection, job.id, state, JobState.CANCELLING, actor, stop_reason="failed", error=error, data=data)


def stop_if_too_many_failed(database: Database, job_id: str, actor: str) -> bool:
    """Wind the job down if the rows failed so far, flushed ones included, exceed ``max_failed_rows``.

    Only then is the job locked. Safe to repeat.
    """
    with database.read() as connection:
        if not _too_many(failed_so_far(connection, job_id)):
            return False
    with database.write() as connection:
        locked_job(database, connection, job_id)
        found = failed_so_far(connection, job_id)
        if not _too_many(found):
            return False
        stop_for_failed_rows(connection, job_id, JobState.IN_PROGRESS, actor, found.failed, found.max_failed_rows)
        return True


def stop_for_failed_rows(
    connection: sa.Connection, job_id: str, state: JobState, actor: str, failed: int, allowed: int
) -> None:
    """Wind the job down because more rows failed than its ``max_failed_rows`` allows."""
    move_job(
        connection,
        job_id,
        state,
        JobState.CANCELLING,
        actor,
        stop_reason="max_failed_rows",
        error=f"{failed} rows failed, max_failed_rows allows {allowed}",
        data={"reason": "max_failed_rows", "failed": failed},
    )


def _too_many(found: sa.Row[Any]) -> bool:
    allowed = found.max_failed_rows
    return allowed is not None and found.state == JobState.IN_PROGRESS and found.failed > allowed


def failed_so_far(connection: sa.Connection, job_id: str) -> sa.Row[Any]:
    """The job's ``state`` and ``max_failed_rows``, and how many rows have ``failed`` in its shards up to now.

    One statement, so that a shard that commits meanwhile counts once. It reads the shards that have failed rows and are
    not committed (``ix_shard_failing``), however many there are besides.
    """
    job, shard = tables.job, tables.shard
    flushed = (
        sa.select(sa.func.coalesce(sa.func.sum(shard.c.n_failed), 0))
        .where(shard.c.job_id == job_id, tables.FAILING)
        .scalar_subquery()
    )
    failed = sa.cast(job.c.rows_failed + flushed, sa.BigInteger()).label("failed")  # PostgreSQL sums to a decimal
    query = sa.select(job.c.state, job.c.max_failed_rows, failed)
    return connection.execute(query.where(job.c.id == job_id)).one()
