"""Takes batches through their states. Whoever does it may die at any step: the next round goes on from there."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.batches import results, validation
from pipeline.batches.steps import LONG, Step, next_step
from pipeline.process.heartbeat import lease_renewer
from pipeline.process.runtime import Runtime
from pipeline.requests.faults import NOT_COMPUTED
from storage import failpoints
from storage.errors import IllegalTransition, Interrupted, InvalidJob, LeaseLost
from storage.files import batches, files
from storage.files.records import Batch
from storage.log_actions import Action
from storage.logs import bound, get_logger
from storage.queue import jobs
from storage.records import Job
from storage.states import BatchState, JobState

log = get_logger(__name__)

_PAGE = 200


def drive(
    runtime: Runtime,
    run: Callable[[Job], object] = lambda job: None,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """One round over all batches that have not ended; whether any of them moved.

    ``run`` is called for each whose job has to go on: a process that runs jobs itself starts it there. A batch that
    cannot be driven now is logged, and holds up no other. ``stopped``: no further batch is begun.
    """
    moved, after = False, ""
    while found := batches.live(runtime.database, after=after, limit=_PAGE):
        for batch in found:
            if stopped():
                return moved
            with bound(tenant=batch.tenant, batch_id=batch.id):
                try:
                    moved |= _drive_one(runtime, batch, run)
                except (IllegalTransition, LeaseLost):
                    moved = True  # somebody else moved it: look again
                except Interrupted:
                    raise
                except Exception as error:
                    text = f"batch {batch.id} could not be taken further, trying again"
                    log.failure(text, error, action=Action.BATCH_POSTPONED)
        after = found[-1].id
    return moved


def collect_files(runtime: Runtime) -> int:
    """Delete the content of files that were deleted, have expired, or were never uploaded whole; returns how many."""
    found = files.useless(runtime.database)
    runtime.store.delete([file.uri for file in found])
    files.forget(runtime.database, found)
    return len(found)


def _drive_one(runtime: Runtime, batch: Batch, run: Callable[[Job], object]) -> bool:
    database, job = runtime.database, validation.job_of(runtime, batch)
    late = database.clock() >= batch.expires_at
    step = next_step(batch, job, late=late)
    if step is Step.RUN:
        assert job is not None
        run(job)
        return False
    if step not in LONG:
        _make(runtime, batch, job, step)
        return True
    seconds = runtime.settings.lease_seconds
    if not batches.take(database, batch, owner=runtime.actor, lease_seconds=seconds):
        return False

    def renew() -> None:
        batches.renew(database, batch.id, owner=runtime.actor, lease_seconds=seconds)

    try:
        with lease_renewer(renew, lease_seconds=seconds, whose=f"batch {batch.id}"):
            _make(runtime, batch, job, step)
    finally:
        batches.release(database, batch.id, owner=runtime.actor)
    return True


def _make(runtime: Runtime, batch: Batch, job: Job | None, step: Step) -> None:
    database = runtime.database
    match step:
        case Step.VALIDATE:
            _validate(runtime, batch)
        case Step.REFUSE:
            assert job is not None
            batches.move(database, batch, BatchState.FAILED, errors=validation.refusal_of_job(job))
        case Step.BEGIN:
            batches.move(database, batch, BatchState.IN_PROGRESS)
        case Step.FINALIZE:
            batches.move(database, batch, BatchState.FINALIZING)
        case Step.CANCEL:
            batches.move(database, batch, BatchState.CANCELLING)
        case Step.STOP:
            assert job is not None
            reason = "cancelled" if batch.state is BatchState.CANCELLING else "expired"
            jobs.request_stop(database, job.id, reason, actor=runtime.actor)
        case Step.COMPLETE:
            _end(runtime, batch, job, BatchState.COMPLETED)
        case Step.END_CANCELLED:
            _end(runtime, batch, job, BatchState.CANCELLED)
        case Step.END_EXPIRED:
            _end(runtime, batch, job, BatchState.EXPIRED)
        case Step.RUN:
            raise AssertionError("a job that has to go on is no step of its batch")


def _validate(runtime: Runtime, batch: Batch) -> None:
    database = runtime.database
    report = validation.check(runtime, batch)
    failpoints.hit("batch.checked")
    if report.n_faults:
        batches.move(database, batch, BatchState.FAILED, errors=validation.errors_of(report))
        return
    model = next(iter(report.models))
    try:
        job = validation.submit(runtime, batch, model, batch.expires_at - database.clock())
    except InvalidJob as error:
        batches.move(database, batch, BatchState.FAILED, errors=validation.refusal(error))
        return
    failpoints.hit("batch.submitted")
    owner = runtime.actor
    batches.set_job(database, batch.id, owner=owner, job_id=job.id, model=model, n_total=report.n_lines)


_MISSING = {
    BatchState.CANCELLED: ("batch_cancelled", "the batch was cancelled before this request was computed"),
    BatchState.EXPIRED: ("batch_expired", "the batch's completion window passed before this request was computed"),
}


def _end(runtime: Runtime, batch: Batch, job: Job | None, target: BatchState) -> None:
    """Write what there is, and end the batch: both files are recorded, or neither."""
    file = validation.input_file(runtime, batch)
    written = results.Written()
    # Before its job there was, nobody has checked the file: a batch of no valid file has no lines.
    if file is not None and (job is not None or not validation.check(runtime, batch).n_faults):
        written = results.write(runtime, batch, file, job, missing=_missing(job, target))
    failpoints.hit("batch.written")
    batches.end(
        runtime.database,
        batch,
        target,
        output=written.output,
        errors=written.errors,
        n_total=written.n_completed + written.n_failed,
        n_completed=written.n_completed,
        n_failed=written.n_failed,
        input_tokens=written.tokens["prompt_tokens"],
        cached_tokens=written.tokens["cached_tokens"],
        output_tokens=written.tokens["completion_tokens"],
    )


def _missing(job: Job | None, target: BatchState) -> tuple[str, str]:
    why = job.error if job is not None and job.state is JobState.FAILED else None
    return _MISSING.get(target) or (NOT_COMPUTED, why or "the service gave this request up")
