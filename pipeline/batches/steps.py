"""What has to happen next to a batch, from its state and its job's. Pure."""

from __future__ import annotations

from enum import Enum, auto

from storage.files.records import Batch
from storage.records import Job
from storage.states import TERMINAL_JOB, BatchState, JobState


class Step(Enum):
    """One thing to do, after which the batch is looked at again."""

    VALIDATE = auto()
    """Check its file; submit its job, or let it fail."""
    REFUSE = auto()
    """Its job was found unusable: let it fail."""
    BEGIN = auto()
    """Its job is planned: it is in progress."""
    FINALIZE = auto()
    """Its job has all rows: it is finalizing."""
    CANCEL = auto()
    """Its job was cancelled by other means: so is the batch."""
    STOP = auto()
    """Wind down its job."""
    COMPLETE = auto()
    """Write the lines and end it."""
    END_CANCELLED = auto()
    END_EXPIRED = auto()
    RUN = auto()
    """Nothing: its job has to go on, whoever runs it."""


LONG = frozenset({Step.VALIDATE, Step.COMPLETE, Step.END_CANCELLED, Step.END_EXPIRED})
"""Steps that read or write whole files: they are made under a lease."""
_STOPPING = frozenset({JobState.CANCELLING, JobState.FINALIZING})
"""States of a job in which there is nothing to stop any more."""


def next_step(batch: Batch, job: Job | None, *, late: bool) -> Step:
    """The next step of a batch that has not ended. ``late``: its completion window has passed."""
    if batch.state is BatchState.CANCELLING:
        if job is None or job.state in TERMINAL_JOB:
            return Step.END_CANCELLED
        return Step.RUN if job.state in _STOPPING else Step.STOP
    if job is None:
        if late or batch.state is not BatchState.VALIDATING:  # a job that is gone was deleted
            return Step.END_EXPIRED
        return Step.VALIDATE
    if job.state in TERMINAL_JOB:
        return _after(batch, job)
    if late and job.state not in _STOPPING:
        return Step.STOP
    if batch.state is BatchState.VALIDATING:
        return Step.RUN if job.state is JobState.VALIDATING else Step.BEGIN
    if batch.state is BatchState.IN_PROGRESS and job.state is JobState.FINALIZING:
        return Step.FINALIZE
    return Step.RUN


def _after(batch: Batch, job: Job) -> Step:
    """The step after the job has ended."""
    if batch.state is BatchState.VALIDATING:
        return Step.REFUSE if job.state is JobState.FAILED and not job.plan else Step.BEGIN
    if job.state is JobState.EXPIRED:
        return Step.END_EXPIRED
    if job.state is JobState.CANCELLED:
        return Step.CANCEL
    return Step.FINALIZE if batch.state is BatchState.IN_PROGRESS else Step.COMPLETE
