"""Deleting a job that has ended: it is marked, which hides it at once, and then its rows go in batches.

Whoever dies in between leaves a marked job, which the next round of maintenance finishes. What was published stays.
"""

from __future__ import annotations

import sqlalchemy as sa

from storage.errors import Conflict, NotFound
from storage.records import Job
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read
from storage.states import TERMINAL_JOB

LEFT_ALONE_SECONDS = 60.0
"""A job marked more recently than this is being deleted by whoever marked it, or could not be deleted a moment ago."""
_SHARDS_AT_ONCE = 200
_ROWS_AT_ONCE = 2000


def mark(database: Database, job_id: str) -> Job:
    """Hide a job that has ended, for ever: no look-up finds it, its idempotency key is free, nothing retries it.

    Raises :class:`NotFound`, and :class:`Conflict` for a job that is live or whose output is being published once more.
    """
    job = tables.job
    _overtake(database, job_id)
    with database.write() as connection:
        query = sa.select(job, now().label("clock")).where(job.c.id == job_id, job.c.deleted_at.is_(None))
        found = connection.execute(database.locked(query)).first()
        if found is None:
            raise NotFound(f"there is no job {job_id}")
        if found.state not in TERMINAL_JOB:
            raise Conflict(f"job {job_id} is {found.state}; only a job that has ended can be deleted: cancel it first")
        if found.needs_republish or (found.finalize_until is not None and found.finalize_until > found.clock):
            raise Conflict(f"the output of job {job_id} is being published once more; delete the job when that is done")
        values = {"deleted_at": now(), "idempotency_key": None}
        connection.execute(job.update().where(job.c.id == job_id).values(**values))
        return read(Job, found)


def _overtake(database: Database, job_id: str) -> None:
    """Older jobs are not to replace what this one has published, when it is there no more to say so."""
    job, older = tables.job, tables.job.alias()
    query = (
        sa.select(older.c.id)
        .join(job, sa.and_(job.c.output_uri == older.c.output_uri, older.c.id < job.c.id))
        .where(job.c.id == job_id, job.c.publishing, ~older.c.overtaken)
    )
    for other in database.scalars(query):  # each in a transaction of its own: two jobs' rows are never locked in one
        database.change(job.update().where(job.c.id == other).values(overtaken=True))


def due(database: Database, *, older_than: float, limit: int) -> list[str]:
    """Ids of jobs that ended more than ``older_than`` seconds ago, the oldest first."""
    job = tables.job
    query = (
        sa.select(job.c.id)
        .where(
            job.c.state.in_(TERMINAL_JOB),
            job.c.ended_at < now() - older_than,
            job.c.deleted_at.is_(None),
            ~job.c.needs_republish,
            sa.or_(job.c.finalize_until.is_(None), job.c.finalize_until < now()),
        )
        .order_by(job.c.id)
        .limit(limit)
    )
    return database.scalars(query)


def unfinished(database: Database, *, limit: int) -> list[Job]:
    """Marked jobs that nobody is deleting, those that have waited longest first."""
    job = tables.job
    query = sa.select(job).where(job.c.deleted_at < now() - LEFT_ALONE_SECONDS).order_by(job.c.deleted_at).limit(limit)
    return database.records(Job, query)


def postpone(database: Database, job_id: str) -> None:
    """A marked job could not be deleted: others come first, and it has its turn again later."""
    job = tables.job
    database.change(job.update().where(job.c.id == job_id, job.c.deleted_at.is_not(None)).values(deleted_at=now()))


def delete_rows(database: Database, job_id: str) -> None:
    """Delete every row of a marked job, in short transactions, the job's own row last. Safe to repeat.

    The files that an incremental schedule has processed stay known (``schedule_file`` with a ``done_at``).
    """
    shard, event, source, file = tables.shard, tables.event, tables.source, tables.schedule_file
    undone = file.c.done_at.is_(None)
    for key, where, most in (
        (shard.c.id, shard.c.job_id == job_id, _SHARDS_AT_ONCE),
        (event.c.id, event.c.job_id == job_id, _ROWS_AT_ONCE),
        (source.c.idx, source.c.job_id == job_id, _ROWS_AT_ONCE),
        (file.c.uri, sa.and_(file.c.job_id == job_id, undone), _ROWS_AT_ONCE),
    ):
        while _delete_some(database, key, where, most):
            pass
    job = tables.job
    database.change(job.delete().where(job.c.id == job_id, job.c.deleted_at.is_not(None)))


def _delete_some(database: Database, key: sa.Column[object], where: sa.ColumnElement[bool], most: int) -> int:
    with database.write() as connection:
        query = sa.select(key).where(where).order_by(key).limit(most)
        found = list(connection.execute(database.locked(query, skip=True)).scalars())
        if found:
            connection.execute(key.table.delete().where(where, key.in_(found)))
        return len(found)
