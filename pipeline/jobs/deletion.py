"""Deleting jobs that have ended: their rows in the database and their work files. What they published stays."""

from __future__ import annotations

import time

from pipeline.output import owner
from pipeline.process.runtime import Runtime
from storage import failpoints, locations
from storage.errors import Conflict, NotFound, RowmillError
from storage.log_actions import Action
from storage.logs import get_logger
from storage.queue import deletion
from storage.records import Job

log = get_logger(__name__)

_AT_ONCE = 100


def delete_job(runtime: Runtime, job_id: str) -> None:
    """Delete a job that has ended. It is gone for every reader as soon as this begins.

    Raises :class:`NotFound`, and :class:`Conflict` for a job that is live. When its work files cannot be deleted now,
    that is raised; maintenance tries again later.
    """
    _finish(runtime, deletion.mark(runtime.database, job_id))


def _finish(runtime: Runtime, job: Job) -> None:
    failpoints.hit("delete.marked")
    # It was released before the job ended, unless a process died in between.
    owner.release(runtime, job)
    # The files first: once the rows are gone, nobody knows of them.
    runtime.store.delete_tree(locations.work_dir(job.output_uri, job.id))
    deletion.delete_rows(runtime.database, job.id)
    log.info(
        "job %s of tenant %s was deleted; what it published stays at %s",
        job.id,
        job.tenant,
        job.output_uri,
        action=Action.JOB_DELETED,
        job_id=job.id,
        tenant=job.tenant,
    )


def delete_old(runtime: Runtime, *, budget: float) -> int:
    """Delete the jobs that ended more than ``job_retention_days`` ago, and finish what others began to delete.

    Takes ``budget`` seconds, to within one job; returns how many jobs are gone. A job that cannot be deleted is logged,
    and holds up no other.
    """
    end = time.monotonic() + budget
    deleted = 0
    for job in deletion.unfinished(runtime.database, limit=_AT_ONCE):
        if time.monotonic() >= end:
            return deleted
        deleted += _try(runtime, job)
    days = runtime.settings.job_retention_days
    while days is not None and time.monotonic() < end:
        found = deletion.due(runtime.database, older_than=days * 86_400, limit=_AT_ONCE)
        for job_id in found:
            if time.monotonic() >= end:
                return deleted
            try:
                job = deletion.mark(runtime.database, job_id)
            except (Conflict, NotFound):
                continue  # retried, or deleted, a moment ago
            deleted += _try(runtime, job)
        if len(found) < _AT_ONCE:
            break
    return deleted


def _try(runtime: Runtime, job: Job) -> bool:
    try:
        _finish(runtime, job)
    except RowmillError as error:
        log.warning(
            "job %s could not be deleted yet, it is tried again later: %s",
            job.id,
            error,
            action=Action.JOB_DELETION_POSTPONED,
            job_id=job.id,
        )
        deletion.postpone(runtime.database, job.id)
        return False
    return True
