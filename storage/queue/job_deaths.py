"""Deaths of planners and finalizers are counted against a budget of their job, as those of attempts against a shard's.

A planner or finalizer that ends politely frees its job. One whose lease has run out, or whose process is known to be
dead, has died at it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from storage.log_actions import Action
from storage.logs import get_logger
from storage.queue import plan_leases
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.transitions import move_job, record
from storage.states import TERMINAL_JOB, JobState

log = get_logger(__name__)


def count(
    database: Database,
    *,
    max_losses: int,
    actor: str,
    owners: Collection[str] | None = None,
    job_id: str | None = None,
) -> None:
    """Free the jobs whose planner or finalizer has died, and end those where that happened ``max_losses`` times.

    Dead are ``owners`` (ids of workers), or whoever's lease has run out. A job that is ended so has failed, or is
    cancelled or expired if that is how it was about to end; 'job retry' goes on with it.
    """
    job = tables.job
    if owners is None:
        dead = sa.and_(job.c.finalize_owner.is_not(None), job.c.finalize_until < now())
    else:
        dead = plan_leases.held_by(owners)
    # Each of the two has its index.
    for which in (job.c.state.not_in(TERMINAL_JOB), job.c.needs_republish):
        query = sa.select(job.c.id, job.c.finalize_owner, job.c.finalize_until).where(which, dead).order_by(job.c.id)
        if job_id is not None:
            query = query.where(job.c.id == job_id)
        for row in database.rows(query):
            if (counted := _count_one(database, row, max_losses, actor)) is not None:
                _tell(*counted, row.finalize_owner)


def _tell(job: sa.Row[Any], deaths: int, owner: str) -> None:
    whose = {"tenant": job.tenant, "job_id": job.id}
    if job.state is JobState.VALIDATING:
        text = "job %s: %s died while planning it, or lost its lease (%d times in a row)"
        log.warning(text, job.id, owner, deaths, action=Action.PLAN_LOST, **whose)
    else:
        text = "job %s: %s died while publishing it, or lost its lease (%d times in a row)"
        log.warning(text, job.id, owner, deaths, action=Action.JOB_PUBLISHING_LOST, **whose)


def _count_one(database: Database, seen: Any, max_losses: int, actor: str) -> tuple[sa.Row[Any], int] | None:
    """The job as it was, and its deaths in a row; ``None`` where somebody else has counted this one."""
    job = tables.job
    with database.write() as connection:
        row = connection.execute(database.locked(sa.select(job).where(job.c.id == seen.id))).one()
        if (row.finalize_owner, row.finalize_until) != (seen.finalize_owner, seen.finalize_until):
            return None
        deaths, state = row.n_lost + 1, row.state
        values: dict[str, Any] = {**plan_leases.FREE, "n_lost": deaths}
        planning = state is JobState.VALIDATING
        doing, kind = ("planning it", "plan.lost") if planning else ("publishing it", "finalize.lost")
        record(connection, row.id, kind, actor, data={"owner": row.finalize_owner, "deaths": deaths})
        ends = state in (JobState.VALIDATING, JobState.FINALIZING, *TERMINAL_JOB) or not row.n_open
        if deaths < max_losses or not ends:
            connection.execute(job.update().where(job.c.id == row.id).values(**values))
            return row, deaths
        error = f"the process died {deaths} times while {doing}; 'rowmill job retry {row.id}' tries again"
        values |= {"n_lost": 0, "finalize_epoch": row.finalize_epoch + 1, "needs_republish": False}
        values["error"] = f"{row.error}; {error}" if row.error and not planning else error
        if state in TERMINAL_JOB:
            connection.execute(job.update().where(job.c.id == row.id).values(**values))
            return row, deaths
        target = JobState.FAILED
        if state is JobState.CANCELLING:
            target = {"cancelled": JobState.CANCELLED, "expired": JobState.EXPIRED}.get(row.stop_reason, target)
        move_job(connection, row.id, state, target, actor, ended_at=now(), data={"error": error}, **values)
        return row, deaths
