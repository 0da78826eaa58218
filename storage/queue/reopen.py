"""Reopening a job that has ended: its failed and cancelled shards, and new shards over rows that failed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage.errors import Conflict, IllegalTransition, NotFound
from storage.queue import plan_leases
from storage.queue.jobs import next_generation
from storage.records import Job, Source
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read
from storage.sql.transitions import move_job, move_shard
from storage.states import TERMINAL_JOB, JobState, ShardState
from storage.tenants import quotas

_UNFINISHED = (ShardState.FAILED, ShardState.CANCELLED)
_REOPEN = "reopen"
"""In the plan of a job that waits for a planner to go on with its retry: what the retry was asked for."""


def reopen(
    database: Database,
    job_id: str,
    *,
    failed_only: bool,
    window_seconds: float,
    actor: str,
    plan_again: bool = False,
    lost: bool = False,
) -> Job:
    """Queue an ended job again, as its next generation.

    Shards that failed or were cancelled become ready again and go on from what they had flushed. For committed ones a
    new shard computes just the failed rows, or all rows when ``failed_only`` is false; the output is republished whole.
    A job that lacks nothing but its publishing goes straight to that.

    With ``plan_again`` the job waits for a planner first, who ends the reopening with :func:`planned_again`. ``lost``:
    its published output is not whole any more. Raises :class:`Conflict` when there is nothing to retry, when the job
    has not ended, or when a newer job has taken the output, and :class:`~storage.errors.QuotaExceeded` when the tenant
    may have no more jobs now, or not that many rows: those that were done and are computed once more count again.
    """
    job = tables.job
    try:
        with database.write() as connection:
            found = connection.execute(database.locked(sa.select(job).where(job.c.id == job_id))).first()
            if found is None or found.deleted_at is not None:
                raise NotFound(f"there is no job {job_id}")
            state = found.state
            if state not in TERMINAL_JOB:
                raise Conflict(
                    f"job {job_id} is {state}; only a job that has ended can be retried ('rowmill job resume {job_id}' "
                    "goes on with one that was interrupted)"
                )
            newer = connection.execute(
                sa.select(job.c.id).where(job.c.output_uri == found.output_uri, job.c.id > job_id).limit(1)
            ).scalar()
            if newer is not None or found.overtaken:
                whose = f"to the newer job {newer}" if newer else "to a newer job, which was deleted"
                raise Conflict(f"the output {found.output_uri} belongs {whose}; submit a new job")
            if state is JobState.COMPLETED and failed_only and not (found.n_failed_shards or found.rows_failed or lost):
                raise Conflict(f"job {job_id} is complete and has no failed rows: there is nothing to retry")
            again = 0
            if plan_again or not found.plan:  # or it never got past planning
                plan = dict(found.plan) | ({_REOPEN: {"failed_only": failed_only}} if found.plan else {})
                values = _afresh(window_seconds) | {"plan": plan}
                move_job(connection, job_id, state, JobState.VALIDATING, actor, **values)
            else:
                again = _reopen_shards(connection, found, state, failed_only, actor, **_afresh(window_seconds))
            quotas.admit_job(database, connection, found.tenant, create=True)
            quotas.admit_rows(database, connection, found.tenant, again)
            return read(Job, connection.execute(sa.select(job).where(job.c.id == job_id)).one())
    except IntegrityError:
        raise Conflict("another live job writes to the same output", field="output") from None


def planned_again(
    database: Database, job_id: str, sources: Sequence[Source], lost: Collection[str], *, actor: str
) -> Job:
    """Go on with reopening a job that waited for a planner: ``sources`` are those of its files that were made again.

    ``lost`` are ids of committed shards whose files are gone: all of their rows are computed again. Raises
    :class:`IllegalTransition` when it waits no more, and :class:`~storage.errors.QuotaExceeded`.
    """
    job, source = tables.job, tables.source
    with database.write() as connection:
        found = connection.execute(database.locked(sa.select(job).where(job.c.id == job_id))).one()
        if found.state != JobState.VALIDATING or _REOPEN not in found.plan:
            raise IllegalTransition("job", found.state, JobState.QUEUED, "it does not wait to be planned again")
        for item in sources:
            connection.execute(
                source.update()
                .where(source.c.job_id == job_id, source.c.idx == item.idx)
                .values(etag=item.etag, n_bytes=item.n_bytes)
            )
        plan = {name: value for name, value in found.plan.items() if name != _REOPEN}
        failed_only = found.plan[_REOPEN]["failed_only"]
        values = {"plan": plan, "error": None, "n_lost": 0, **plan_leases.FREE}
        again = _reopen_shards(connection, found, JobState.VALIDATING, failed_only, actor, lost, **values)
        quotas.admit_rows(database, connection, found.tenant, again)
        return read(Job, connection.execute(sa.select(job).where(job.c.id == job_id)).one())


def _to_reopen(
    connection: sa.Connection, job_id: str, failed_only: bool, lost: Collection[str] = ()
) -> list[sa.Row[Any]]:
    """The newest shard of each position whose rows, or some of them, are computed again."""
    shard = tables.shard
    newest: dict[int, sa.Row[Any]] = {}
    for row in connection.execute(sa.select(shard).where(shard.c.job_id == job_id).order_by(shard.c.idx, shard.c.gen)):
        newest[row.idx] = row
    return [
        row for row in newest.values() if row.state in _UNFINISHED or row.n_failed or not failed_only or row.id in lost
    ]


def sources_to_read(database: Database, job: Job, lost: Collection[str]) -> list[Source]:
    """The files that the shards read which :func:`planned_again` will reopen."""
    source = tables.source
    with database.read() as connection:
        found = _to_reopen(connection, job.id, job.plan[_REOPEN]["failed_only"], lost)
        wanted = {item.source for row in found for item in row.slices}
        every = connection.execute(sa.select(source).where(source.c.job_id == job.id).order_by(source.c.idx))
        return [read(Source, row) for row in every if row.idx in wanted]


def _afresh(window_seconds: float) -> dict[str, Any]:
    """What is forgotten of a job's end. Whoever published it before has nothing to say any more."""
    return {
        "stop_reason": None,
        "error": None,
        "ended_at": None,
        "cancel_requested_at": None,
        "finalize_epoch": tables.job.c.finalize_epoch + 1,
        **plan_leases.FREE,
        "needs_republish": False,
        "n_lost": 0,
        "expires_at": now() + window_seconds,
    }


def _reopen_shards(
    connection: sa.Connection,
    job: sa.Row[Any],
    state: JobState,
    failed_only: bool,
    actor: str,
    lost: Collection[str] = (),
    **values: Any,
) -> int:
    """Make shards ready, or new ones, and queue the job with these ``values``.

    Returns how many rows that were done are computed once more.
    """
    table = tables.shard
    connection.execute(tables.gc_queue.delete().where(tables.gc_queue.c.job_id == job.id))
    gen = job.gen + 1
    due = connection.execute(sa.select(now())).scalar_one()
    opened = rows_back = failed_back = 0
    for row in _to_reopen(connection, job.id, failed_only, lost):
        if row.state in _UNFINISHED:
            more: dict[str, Any] = {}
            if not failed_only and row.select is not None:
                # All rows means these too, which an earlier generation had computed.
                more["select"] = None
                rows_back += row.row_n - len(row.select)
            more |= {"n_fail": 0, "n_lost": 0, "n_crash": 0, "suspect": None, "run_after": due, "error": None}
            move_shard(connection, row, ShardState.READY, actor, **more)
            opened += 1
            continue
        # Whatever this shard's own selection was, its rows count as done; only the selected ones are taken back.
        some = failed_only and row.id not in lost
        again = next_generation(row, gen) | {"run_after": due, "select": row.failed if some else None}
        connection.execute(table.insert().values(**again))
        opened += 1
        rows_back += len(row.failed) if some else row.row_n
        failed_back += len(row.failed)
    columns = tables.job.c
    move_job(
        connection,
        job.id,
        state,
        JobState.QUEUED,
        actor,
        gen=gen,
        n_open=opened,
        n_failed_shards=0,
        rows_done=columns.rows_done - rows_back,
        rows_failed=columns.rows_failed - failed_back,
        data={"gen": gen, "shards": opened, "rows": rows_back},
        **values,
    )
    if not opened:
        move_job(connection, job.id, JobState.QUEUED, JobState.FINALIZING, actor)
    return rows_back
