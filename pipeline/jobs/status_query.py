"""From what the database holds to what a user sees."""

from __future__ import annotations

from pipeline.spec.status import JobStatus, Phase, RequestStatus
from storage import locations
from storage.fleet import reports
from storage.queue import publish_leases
from storage.records import Job
from storage.sql.database import Database
from storage.states import TERMINAL_JOB, JobState, RequestState, ShardState

_LAST_MOMENT = 253_402_300_799.0
"""The end of the year 9999: earlier versions accepted completion windows that end later, or never."""


def job_status(database: Database, job: Job) -> JobStatus:
    """The job at this moment."""
    progress = reports.progress(database, job)
    spec = job.spec
    phase, seconds = _phase(job, progress)
    return JobStatus(
        id=job.id,
        state=job.state,
        tenant=job.tenant,
        task=spec["task"],
        model=spec["model"],
        engine=job.engine,
        output=job.output_uri,
        input=tuple(spec["input"]),
        rows_total=job.rows_total,
        input_rows=job.plan.get("input_rows"),
        rows_done=progress.rows_done,
        rows_failed=progress.rows_failed,
        rows_resumed=progress.rows_resumed,
        shards=progress.shards,
        tokens=progress.tokens,
        attempts=progress.attempts,
        failures=progress.failures,
        losses=progress.losses,
        gen=job.gen,
        stop_reason=job.stop_reason,
        error=job.error,
        refused=_refused(job),
        message=_message(database, job),
        phase=phase,
        phase_seconds=seconds,
        created_at=job.created_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
        expires_at=None if job.expires_at is None or job.expires_at > _LAST_MOMENT else job.expires_at,
        metadata=spec["metadata"],
        idempotency_key=job.idempotency_key,
    )


def _refused(job: Job) -> bool:
    return job.state is JobState.FAILED and not job.plan


_PHASES = {
    JobState.VALIDATING: Phase.READING,
    JobState.FINALIZING: Phase.PUBLISHING,
    JobState.CANCELLING: Phase.STOPPING,
}


def _phase(job: Job, progress: reports.Progress) -> tuple[Phase | None, float | None]:
    """What the job is at, and the seconds since; ``None`` for one that has ended."""
    if job.state in TERMINAL_JOB:
        return None, None
    if job.state in _PHASES:
        return _PHASES[job.state], progress.seconds
    if progress.running:
        loads = progress.loading == progress.running
        return (Phase.LOADING, progress.loading_seconds) if loads else (Phase.COMPUTING, None)
    return Phase.RETRYING if progress.failures or progress.losses else Phase.WAITING, progress.seconds


def _message(database: Database, job: Job) -> str | None:
    if job.n_open == 0 and job.state in (JobState.FINALIZING, JobState.CANCELLING):
        reason = publish_leases.last_failure(database, job.id)
        return None if reason is None else f"its output could not be published yet: {reason}"
    if job.state is JobState.CANCELLED:
        return f"cancelled; 'rowmill job retry {job.id}' goes on from what is done"
    if job.state is JobState.EXPIRED:
        return f"its completion window passed; 'rowmill job retry {job.id}' goes on from what is done"
    if _refused(job):
        return f"it was refused before any row was computed; 'rowmill job retry {job.id}' once the cause is mended"
    if job.state is JobState.FAILED and job.n_shards:
        return f"'rowmill job retry {job.id}' goes on from what is done, once the cause is mended"
    return None


_OF_SHARD = {
    ShardState.READY: RequestState.PENDING,
    ShardState.RUNNING: RequestState.RUNNING,
    ShardState.FAILED: RequestState.FAILED,
    ShardState.CANCELLED: RequestState.CANCELLED,
}


def request_status(database: Database, job: Job, row: int) -> RequestStatus:
    """One row of the job, derived from its shard, the bitmaps and the part files. :class:`NotFound` beyond the end."""
    place = reports.locate_row(database, job, row)
    shard = place.shard
    code = message = None
    if place.row in shard.failed:
        state = RequestState.FAILED
        if place.exception is not None:
            code, message = place.exception.code, place.exception.message
        else:
            message = "the reason is in the error column of the output"
    elif place.row in shard.done or shard.state is ShardState.COMMITTED:
        state = RequestState.SUCCEEDED
    else:
        state = _OF_SHARD[shard.state]
        if state is RequestState.CANCELLED and job.stop_reason == "expired":
            state = RequestState.EXPIRED
        if state is RequestState.FAILED:
            code, message = "shard_failed", shard.error
    part = None if place.part is None else place.part.uri
    if shard.state is ShardState.COMMITTED and job.state is JobState.COMPLETED:
        part_rows = job.plan.get("part_rows")
        part = locations.part(job.output_uri, row // part_rows if part_rows else shard.idx)
    return RequestStatus(
        job=job.id,
        row=row,
        state=state,
        shard=shard.id,
        attempt=shard.attempt_no or None,
        code=code,
        message=message,
        output=part,
    )
