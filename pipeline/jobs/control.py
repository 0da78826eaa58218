"""Cancel a job, or retry it."""

from __future__ import annotations

from pipeline.jobs import preflight
from pipeline.output import owner as output_owner
from pipeline.output.destination import chunks_are_gone
from pipeline.process.runtime import Runtime
from pipeline.spec.job_spec import stored
from storage import locations
from storage.errors import Conflict
from storage.queue import jobs, regrouped_rows, reopen
from storage.records import Job
from storage.states import TERMINAL_JOB, JobState


def cancel_job(runtime: Runtime, job_id: str) -> Job:
    """Begin to wind the job down; its finished rows will be published as partial."""
    return jobs.request_stop(runtime.database, job_id, "cancelled", actor=runtime.actor)


def retry_job(runtime: Runtime, job_id: str, *, failed_only: bool = True) -> Job:
    """Queue an ended job again: its unfinished shards, and its failed rows (or all rows)."""
    job = jobs.get(runtime.database, job_id)
    spec = stored(job.spec)
    regrouped, lost = bool(job.plan.get("part_rows")), False
    if job.state is JobState.COMPLETED and failed_only:
        if regrouped and chunks_are_gone(runtime.store, regrouped_rows.chunks(runtime.database, job_id)):
            raise Conflict(
                f"what job {job_id} was made of has been deleted (its rows lay in another order, in files of its own); "
                f"'rowmill job retry {job_id} --all' computes every row again"
            )
        nothing = not job.rows_failed and not job.n_failed_shards
        lost = nothing and not runtime.store.exists(locations.success(job.output_uri))
    if job.state in TERMINAL_JOB and not job.plan and runtime.settings.broker_url is not None:
        preflight.check_in_fleet(runtime, preflight.request_of_job(runtime, job, spec))
    if job.state in TERMINAL_JOB:
        output_owner.refuse_retry(runtime, job, overwrite=spec.overwrite)
    reopened = reopen.reopen(
        runtime.database,
        job_id,
        failed_only=failed_only,
        window_seconds=spec.window_seconds,
        actor=runtime.actor,
        # Its shards read chunks: whoever plans makes those again that are gone.
        plan_again=regrouped or bool(job.plan.get("converted")),
        lost=lost,
    )
    output_owner.check(runtime, reopened, over_rows=True)
    return reopened
