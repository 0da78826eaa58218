"""Reopening a job that has ended: its dead and cancelled shards, and new shards over rows that failed."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage import quotas, rows, tables
from storage.database import Database, now, pack, unpack
from storage.errors import Conflict, NotFound
from storage.jobs import next_generation
from storage.records import Job
from storage.states import TERMINAL_JOB, JobState, ShardState
from storage.transitions import move_job, move_shard


def reopen(database: Database, job_id: str, *, failed_only: bool, window_seconds: float, actor: str) -> Job:
    """Queue an ended job again, as its next generation.

    Shards that were given up or cancelled become ready again and go on from what they had flushed. For committed ones a
    new shard computes just the failed rows, or all rows when ``failed_only`` is false; the output is republished whole.
    Raises :class:`Conflict` when there is nothing to retry, when the job has not ended, or when a newer job has taken
    the output, and :class:`~storage.errors.QuotaExceeded` when the tenant may have no more jobs now, or not that many
    rows: those that were done and are computed once more count again.
    """
    job = tables.job
    try:
        with database.write() as connection:
            found = connection.execute(database.locked(sa.select(job).where(job.c.id == job_id))).first()
            if found is None or found.deleted_at is not None:
                raise NotFound(f"there is no job {job_id}")
            state = JobState(found.state)
            if state not in TERMINAL_JOB:
                raise Conflict(f"job {job_id} is {state}; only a job that has ended can be retried")
            newer = connection.execute(
                sa.select(job.c.id).where(job.c.output_uri == found.output_uri, job.c.id > job_id).limit(1)
            ).scalar()
            if newer is not None or found.overtaken:
                whose = f"to the newer job {newer}" if newer else "to a newer job, which was deleted"
                raise Conflict(f"the output {found.output_uri} belongs {whose}; submit a new job")
            again = 0
            if not found.plan and state is not JobState.COMPLETED:
                # It never got past planning.
                move_job(
                    connection,
                    job_id,
                    state,
                    JobState.VALIDATING,
                    actor,
                    error=None,
                    stop_reason=None,
                    ended_at=None,
                    cancel_requested_at=None,
                    finalize_epoch=job.c.finalize_epoch + 1,
                    expires_at=now() + window_seconds,
                )
            else:
                again = _reopen_shards(connection, found, state, failed_only, window_seconds, actor)
            quotas.admit_job(database, connection, found.tenant, create=True)
            quotas.admit_rows(database, connection, found.tenant, again)
            return rows.job(connection.execute(sa.select(job).where(job.c.id == job_id)).one())
    except IntegrityError:
        raise Conflict("another live job writes to the same output", field="output") from None


def _reopen_shards(
    connection: sa.Connection, job: sa.Row[Any], state: JobState, failed_only: bool, window_seconds: float, actor: str
) -> int:
    """Returns how many rows that were done are computed once more."""
    table = tables.shard
    connection.execute(tables.gc_queue.delete().where(tables.gc_queue.c.job_id == job.id))
    gen = job.gen + 1
    due = connection.execute(sa.select(now())).scalar_one()
    newest: dict[int, sa.Row[Any]] = {}
    for row in connection.execute(sa.select(table).where(table.c.job_id == job.id).order_by(table.c.idx, table.c.gen)):
        newest[row.idx] = row
    opened = rows_back = failed_back = 0
    for row in newest.values():
        if row.state in (ShardState.FAILED, ShardState.CANCELLED):
            more: dict[str, Any] = {}
            if not failed_only and row.select_bm is not None:
                # All rows means these too, which an earlier generation had computed.
                more["select_bm"] = None
                rows_back += row.row_n - len(unpack(row.select_bm))
            move_shard(
                connection,
                row,
                ShardState.READY,
                actor,
                n_fail=0,
                n_lost=0,
                n_crash=0,
                suspect_bm=None,
                run_after=due,
                error=None,
                **more,
            )
            opened += 1
            continue
        failed = unpack(row.failed_bm)
        if failed_only and not failed:
            continue
        # Whatever this shard's own selection was, its rows count as done; only the selected ones are taken back.
        again = next_generation(row, gen) | {"run_after": due, "select_bm": pack(failed) if failed_only else None}
        connection.execute(table.insert().values(**again))
        opened += 1
        rows_back += len(failed) if failed_only else row.row_n
        failed_back += len(failed)
    if not opened:
        raise Conflict(f"job {job.id} has no failed rows and no unfinished shards: there is nothing to retry")
    columns = tables.job.c
    move_job(
        connection,
        job.id,
        state,
        JobState.QUEUED,
        actor,
        gen=gen,
        n_open=opened,
        n_dead=0,
        rows_done=columns.rows_done - rows_back,
        rows_failed=columns.rows_failed - failed_back,
        stop_reason=None,
        error=None,
        ended_at=None,
        cancel_requested_at=None,
        # Whoever published the job before has nothing to say any more.
        finalize_epoch=columns.finalize_epoch + 1,
        finalize_owner=None,
        finalize_until=None,
        expires_at=now() + window_seconds,
        data={"gen": gen, "shards": opened, "rows": rows_back},
    )
    return rows_back
