"""Planning the jobs that wait for it, one after the other, in a fleet: each by one planner at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from pipeline.engines.base import Cancellation
from pipeline.jobs.plan import plan_job, refuse_job
from pipeline.process.heartbeat import lease_renewer
from pipeline.process.runtime import Runtime
from storage import failpoints
from storage.errors import (
    CommitUnknown,
    IllegalTransition,
    Interrupted,
    InvalidJob,
    LeaseLost,
    RowmillError,
    TransientError,
)
from storage.log_actions import Action
from storage.logs import bound, get_logger
from storage.queue import job_deaths, plan_leases
from storage.records import Job
from storage.redaction import redact_text

log = get_logger(__name__)


def plan_waiting(runtime: Runtime, over: Callable[[], bool], interrupt: Cancellation) -> Iterator[Job]:
    """Plan jobs until none waits, or ``over`` says so; yields those that were planned.

    A job that cannot be planned holds up no other: it is refused, or, where the cause may pass, tried again later; in
    both cases its ``error`` says why. ``interrupt`` ends a long plan early, and leaves the job to others. Raises
    :class:`TransientError` when the database does not answer.
    """
    while not over():
        # Of its own, not the worker's: two threads of one worker may plan.
        owner = plan_leases.owner_of(runtime.worker.id)
        job_deaths.count(runtime.database, max_losses=runtime.settings.max_losses, actor=runtime.actor)
        job = plan_leases.claim(runtime.database, owner=owner, lease_seconds=runtime.settings.lease_seconds)
        if job is None:
            return
        with bound(tenant=job.tenant, job_id=job.id, worker=runtime.worker.id):
            log.info("planning job %s begins", job.id, action=Action.PLAN_STARTED)
            began = time.monotonic()
            planned = _plan(runtime, job, owner, interrupt)
            if planned is not None:
                what = f"{planned.rows_total} rows in {planned.n_shards} shards"
                text = "job %s is planned in %.1f s: %s"
                log.info(text, job.id, time.monotonic() - began, what, action=Action.PLAN_DONE)
        if planned is not None:
            yield planned


def _plan(runtime: Runtime, job: Job, owner: str, interrupt: Cancellation) -> Job | None:
    seconds = runtime.settings.lease_seconds

    def renew() -> None:
        plan_leases.hold(runtime.database, job.id, owner=owner, lease_seconds=seconds)

    try:
        with lease_renewer(renew, lease_seconds=seconds, whose=f"the planner of job {job.id}"):
            failpoints.hit("plan.claimed")
            return plan_job(runtime, job, interrupt, owner=owner)
    except InvalidJob as error:
        log.warning("job %s was refused: %s", job.id, error, action=Action.JOB_REFUSED)
    except (IllegalTransition, LeaseLost):
        pass  # another worker planned it, or it was cancelled
    except Interrupted as error:
        log.info("%s", error, action=Action.PLAN_INTERRUPTED)
        plan_leases.release(runtime.database, owner)
    except (TransientError, CommitUnknown) as error:
        log.warning("job %s could not be planned, trying again later: %s", job.id, error, action=Action.PLAN_POSTPONED)
        _postpone(runtime, job, owner, str(error))
    except RowmillError as error:
        log.warning("job %s was refused: %s", job.id, error, action=Action.JOB_REFUSED)
        _refuse(runtime, job, error)
    except Exception as error:
        log.exception("job %s could not be planned, trying again later", job.id, action=Action.PLAN_POSTPONED)
        _postpone(runtime, job, owner, redact_text(f"{type(error).__name__}: {error}"))
    return None


def _postpone(runtime: Runtime, job: Job, owner: str, reason: str) -> None:
    error = f"it could not be planned yet, and is tried again: {reason}"
    plan_leases.postpone(runtime.database, job.id, owner=owner, error=error, delay=runtime.settings.again_seconds)


def _refuse(runtime: Runtime, job: Job, error: RowmillError) -> None:
    try:
        refuse_job(runtime, job, error)
    except IllegalTransition:
        pass  # cancelled meanwhile
    except TransientError as unreachable:
        log.warning(
            "what the planning of job %s left could not be deleted: %s",
            job.id,
            unreachable,
            action=Action.PLAN_CLEANUP_FAILED,
        )
