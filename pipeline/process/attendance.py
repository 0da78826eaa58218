"""Whether anybody works, or would work, on a job that has not ended; and what to say when nobody does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from pipeline.process.runtime import Runtime, is_alive
from pipeline.spec.status import JobStatus, Phase
from storage.broker import CONTROL_QUEUE
from storage.errors import TransientError
from storage.fleet import attendance, workers
from storage.fleet.workers import WorkerStatus
from storage.records import Job
from storage.states import JobState

_CONTROLLED = (JobState.VALIDATING, JobState.FINALIZING, JobState.CANCELLING)
"""States that a control worker leads out of."""


@contextmanager
def attending(runtime: Runtime, job_id: str) -> Iterator[None]:
    """While inside, others see that this process, which is registered, is at work on the job."""
    attendance.attend(runtime.database, runtime.worker.id, job_id)
    try:
        yield
    finally:
        with suppress(TransientError):
            attendance.leave(runtime.database, runtime.worker.id, job_id)


def with_attendance(runtime: Runtime, jobs: Sequence[Job], statuses: Sequence[JobStatus]) -> list[JobStatus]:
    """The statuses of these jobs, with ``attended``, ``interrupted`` and ``message`` where nobody works on them.

    The phase of one that is to be planned, and that nobody has taken on, is :attr:`Phase.UNPLANNED`.
    """
    live = [job.id for job, status in zip(jobs, statuses, strict=True) if not status.terminal]
    if not live:
        return list(statuses)
    marks = attendance.attendants(runtime.database, live)
    alive = [seen for seen in workers.listed(runtime.database) if _lives(runtime, seen)]
    ids = {seen.worker.id for seen in alive}
    queues = {queue for seen in alive if not seen.draining for queue in seen.worker.queues}
    fleet = runtime.settings.broker_url is not None
    found = []
    for job, status in zip(jobs, statuses, strict=True):
        queue = CONTROL_QUEUE if job.state in _CONTROLLED else job.queue
        taken_on = not status.terminal and bool(marks[job.id] & ids)
        if status.phase is Phase.READING and not taken_on:
            status = replace(status, phase=Phase.UNPLANNED)
        if status.terminal or taken_on or queue in queues:
            found.append(status)
        elif fleet:
            message = f"no worker is alive for the queue {queue!r}: see 'rowmill worker list'"
            found.append(replace(status, attended=False, message=_with(status, message)))
        else:
            begun = job.started_at is not None or job.state in _CONTROLLED[1:] or bool(marks[job.id])
            what = "interrupted" if begun else "not started"
            message = f"{what}; nobody is running it; resume with 'rowmill job resume {job.id}'"
            found.append(replace(status, attended=False, interrupted=begun, message=_with(status, message)))
    return found


def _with(status: JobStatus, message: str) -> str:
    return message if status.message is None else f"{message}; {status.message}"


def _lives(runtime: Runtime, seen: WorkerStatus) -> bool:
    """On this host a process can be looked for; of another one only its heartbeats are seen."""
    return is_alive(seen.worker) if seen.worker.host == runtime.worker.host else seen.state != "silent"
