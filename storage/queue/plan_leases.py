"""One planner at a time: a lease on a job that is not planned yet.

It only saves work. Two planners of one job do no harm: what they write is the same, and the first one's plan counts.
Until a job is planned nobody publishes it, so the lease lies in the columns of the finalizer's.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from storage.errors import IllegalTransition, LeaseLost
from storage.records import Job
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read
from storage.states import JobState


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


def let_go(database: Database, owners: Collection[str]) -> None:
    """Free at once what planners hold whose names begin so: they are no more, or have ended early."""
    job = tables.job
    theirs = sa.or_(sa.false(), *(job.c.finalize_owner.startswith(owner, autoescape=True) for owner in owners))
    freed = {"finalize_owner": None, "finalize_until": None}
    database.change(job.update().where(job.c.state == JobState.VALIDATING, theirs).values(**freed))
