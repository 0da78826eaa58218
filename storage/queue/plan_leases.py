"""One planner at a time: a lease on a job that is not planned yet.

It only saves work. Two planners of one job do no harm: what they write is the same, and the first one's plan counts.
Until a job is planned nobody publishes it, so the lease lies in the columns of the finalizer's.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping

import sqlalchemy as sa

from storage.errors import IllegalTransition, LeaseLost
from storage.records import Job
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read
from storage.states import JobState

FREE: Mapping[str, None] = {"finalize_owner": None, "finalize_until": None}
"""The values of a job that nobody plans or publishes."""
_MARK = "#"


def claim(database: Database, *, owner: str, lease_seconds: float) -> Job | None:
    """Take the lease on a job that waits for its plan; ``None`` when there is none to take.

    Those that nobody has tried yet come first, the oldest of them before the others.
    """
    job = tables.job
    free = sa.or_(job.c.finalize_until.is_(None), job.c.finalize_until < now())
    query = sa.select(job).where(job.c.state == JobState.VALIDATING, free)
    query = query.order_by(job.c.finalize_until.asc().nulls_first(), job.c.id).limit(1)
    with database.write() as connection:
        found = connection.execute(database.locked(query, skip=True)).first()
        if found is None:
            return None
        connection.execute(
            job.update().where(job.c.id == found.id).values(finalize_owner=owner, finalize_until=now() + lease_seconds)
        )
        return read(Job, found)


def postpone(database: Database, job_id: str, *, owner: str, error: str, delay: float) -> None:
    """Give the job back: it is tried again in ``delay`` seconds, and says until then what was in the way."""
    job = tables.job
    mine = sa.or_(job.c.finalize_owner == owner, job.c.finalize_owner.is_(None))
    database.change(
        job.update()
        .where(job.c.id == job_id, job.c.state == JobState.VALIDATING, mine)
        .values(finalize_owner=None, finalize_until=now() + delay, error=error)
    )


def hold(database: Database, job_id: str, *, owner: str, lease_seconds: float) -> None:
    """Take the lease, or renew it.

    Raises :class:`LeaseLost` while another planner has it, and :class:`IllegalTransition` when the job is planned, or
    was cancelled.
    """
    job = tables.job
    free = sa.or_(job.c.finalize_until.is_(None), job.c.finalize_until < now(), job.c.finalize_owner == owner)
    with database.write() as connection:
        held = connection.execute(
            job.update()
            .where(job.c.id == job_id, job.c.state == JobState.VALIDATING, free)
            .values(finalize_owner=owner, finalize_until=now() + lease_seconds)
        )
        if held.rowcount == 1:
            return
        state = connection.execute(sa.select(job.c.state).where(job.c.id == job_id)).scalar_one()
    if state != JobState.VALIDATING:
        raise IllegalTransition("job", state, JobState.QUEUED, "it was planned by another worker, or cancelled")
    raise LeaseLost(f"another worker plans job {job_id}")


def release(database: Database, owner: str) -> None:
    """Free at once what this planner holds: it has ended early."""
    job = tables.job
    held = (job.c.state == JobState.VALIDATING, job.c.finalize_owner == owner)
    database.change(job.update().where(*held).values(**FREE))


def owner_of(worker_id: str) -> str:
    """The name under which a planner of this worker holds a lease: planners of one worker tell themselves apart."""
    return f"{worker_id}{_MARK}{secrets.token_hex(4)}"


def worker_of(owner: str) -> str:
    """The worker whose planner or finalizer this is."""
    return owner.partition(_MARK)[0]


def held_by(workers: Collection[str]) -> sa.ColumnElement[bool]:
    """Jobs that planners or finalizers of these workers hold."""
    owner = tables.job.c.finalize_owner
    planners = (owner.startswith(f"{worker}{_MARK}", autoescape=True) for worker in workers)
    return sa.or_(owner.in_(list(workers)), *planners)
