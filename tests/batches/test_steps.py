"""Whatever a batch and its job are at, there is a next step, and following the steps ends the batch."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches.steps import Step, next_step
from storage.files.records import Batch
from storage.records import Job
from storage.states import JOB, TERMINAL_BATCH, TERMINAL_JOB, BatchState, JobState, check

_OPEN = [state for state in BatchState if state not in TERMINAL_BATCH]
_TARGETS = {
    Step.REFUSE: BatchState.FAILED,
    Step.BEGIN: BatchState.IN_PROGRESS,
    Step.FINALIZE: BatchState.FINALIZING,
    Step.CANCEL: BatchState.CANCELLING,
    Step.COMPLETE: BatchState.COMPLETED,
    Step.END_CANCELLED: BatchState.CANCELLED,
    Step.END_EXPIRED: BatchState.EXPIRED,
}


def batch(state: BatchState) -> Batch:
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(Batch))
    return Batch(**{**values, "id": "batch_1", "state": state})


def job(state: JobState, *, planned: bool = True) -> Job:
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(Job))
    return Job(**{**values, "id": "job", "state": state, "plan": {"rows": 1} if planned else {}})


@given(st.sampled_from(_OPEN), st.none() | st.sampled_from(list(JobState)), st.booleans(), st.booleans())
def test_each_step_is_a_transition_that_the_table_has(
    state: BatchState, of_job: JobState | None, planned: bool, late: bool
) -> None:
    step = next_step(batch(state), None if of_job is None else job(of_job, planned=planned), late=late)
    if step in _TARGETS:
        check(state, _TARGETS[step])
    if step is Step.STOP:
        assert of_job is not None
        assert JobState.CANCELLING in JOB[of_job]
    if step is Step.RUN:
        assert of_job is not None
        assert of_job not in TERMINAL_JOB


@given(st.sampled_from(_OPEN), st.sampled_from(sorted(TERMINAL_JOB)), st.booleans(), st.booleans())
def test_after_its_job_has_ended_a_batch_ends_within_three_steps(
    state: BatchState, of_job: JobState, planned: bool, late: bool
) -> None:
    now, ended = batch(state), job(of_job, planned=planned)
    for _ in range(4):
        if now.state in TERMINAL_BATCH:
            break
        now = replace(now, state=_TARGETS[next_step(now, ended, late=late)])
    assert now.state in TERMINAL_BATCH
    if state is BatchState.CANCELLING:
        assert now.state is BatchState.CANCELLED
