"""The states of jobs, shards, attempts, requests, models and batches, with one table each of who may follow whom.

Everything that moves a row between states asks :func:`check` first; an illegal move raises and changes nothing.
The diagrams in ``docs/reference/states.md`` are generated from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, TypeVar

from storage.errors import IllegalTransition


class JobState(StrEnum):
    """A job's life, in the words of OpenAI's Batch API."""

    VALIDATING = "validating"
    """Accepted, not planned yet; or retried, where chunks of its input may have to be made again. The planner moves it
    to ``queued``, or to ``failed`` when the input is unusable."""
    QUEUED = "queued"
    """Shards exist, none was claimed yet. The first claim moves it on; an empty job goes straight to ``finalizing``."""
    IN_PROGRESS = "in_progress"
    """At least one shard was claimed. The commit (or failure) that closes the last shard moves it on."""
    FINALIZING = "finalizing"
    """Every shard is closed: too late to cancel. The finalizer publishes the output and moves it to ``completed`` or
    ``failed``."""
    CANCELLING = "cancelling"
    """Being wound down (``stop_reason`` says why). Running shards flush and end; what is done is published. If that is
    all of it, the job completes."""
    COMPLETED = "completed"
    """Published whole. Only a retry reopens it: of its failed rows, or of what was lost of its output."""
    FAILED = "failed"
    """Ended by an error. Only a retry reopens it."""
    CANCELLED = "cancelled"
    """Ended by a user; the finished rows are published as partial. Only a retry reopens it."""
    EXPIRED = "expired"
    """Ended by its completion window; the finished rows are published as partial. Only a retry reopens it."""


class ShardState(StrEnum):
    """A shard is a contiguous run of a job's rows: the unit of claiming and of committing."""

    READY = "ready"
    """Waits for a claim, from ``run_after`` on."""
    RUNNING = "running"
    """Leased to one attempt. Its worker, or the reaper when the lease has run out, moves it on."""
    COMMITTED = "committed"
    """One attempt's output is final. Nothing moves it."""
    FAILED = "failed"
    """The budget of failures or losses is spent. Only ``job retry`` reopens it."""
    CANCELLED = "cancelled"
    """Its job was wound down first. Only ``job retry`` reopens it."""


class AttemptState(StrEnum):
    """One try at a shard, by one worker, under one fence number."""

    RUNNING = "running"
    """The worker holds the lease."""
    SUCCEEDED = "succeeded"
    """Its commit won."""
    FAILED = "failed"
    """It ended with an error that its worker reported."""
    LOST = "lost"
    """Its lease ran out and was reaped, or its process died. Should it come back after all, it is superseded."""
    RELEASED = "released"
    """Its worker drained, was interrupted, or lost its engine to rows of others: handed back, no budget spent."""
    CANCELLED = "cancelled"
    """Ended because the job was wound down."""
    SUPERSEDED = "superseded"
    """It came back after its shard had moved on; it wrote nothing."""


class RequestState(StrEnum):
    """One row of a job. Derived from its shard, never stored row by row."""

    PENDING = "pending"
    """Its shard waits for a claim (again, after an attempt that did not get to this row)."""
    RUNNING = "running"
    """Its shard is leased to a worker, which has not flushed this row yet."""
    SUCCEEDED = "succeeded"
    """Flushed with a result."""
    FAILED = "failed"
    """Flushed with an error, or its shard failed. Only a retry computes it again."""
    CANCELLED = "cancelled"
    """Its job was cancelled before the row was computed. Only a retry computes it."""
    EXPIRED = "expired"
    """Its job's completion window passed before the row was computed. Only a retry computes it."""


class FireState(StrEnum):
    """One fire of a schedule: a time at which it came due, recorded once however many beats run."""

    PENDING = "pending"
    """Decided, and no job yet: the tick submits it; it may wait for an earlier fire's job to end, or for a store."""
    SUBMITTED = "submitted"
    """Its job is in the queue (or has ended: ask the job). Set in the transaction that inserts the job."""
    SKIPPED = "skipped"
    """Passed over, with the reason: an earlier fire still runs, it was noticed too late, a newer one replaced it."""
    EMPTY = "empty"
    """Nothing to do: an incremental schedule found no file that is new."""
    FAILED = "failed"
    """Its job was refused, with the reason (a model that is gone, an output that is taken, a quota)."""


class RevisionState(StrEnum):
    """One revision of a registered model: fixed content, named by its digest."""

    DRAFT = "draft"
    """Registered, and not proved; or its newest validation did not pass. A PASS moves it on."""
    VALIDATED = "validated"
    """Its newest validation passed: it may be activated."""
    ACTIVE = "active"
    """What jobs get that name the model alone. At most one revision of a model is active."""
    RETIRED = "retired"
    """It was active and another one took its place, or it was withdrawn. A rollback makes it active again."""


class BatchState(StrEnum):
    """A batch of the gateway, in the words of OpenAI's Batch API. Its rows are computed by one job."""

    VALIDATING = "validating"
    """Created. Its file is checked line by line, and its job is planned."""
    IN_PROGRESS = "in_progress"
    """Its job is planned: rows are computed, or wait for a worker."""
    FINALIZING = "finalizing"
    """Every row has an answer or an error; the output is written."""
    CANCELLING = "cancelling"
    """Somebody cancelled it. Its job is wound down, and what is finished is written."""
    COMPLETED = "completed"
    """Every line of its file has a line in the output file or in the error file."""
    FAILED = "failed"
    """Its file, or what it asks for, cannot be run: ``errors`` says why. No line was computed."""
    CANCELLED = "cancelled"
    """Ended by a user. Finished lines are in the output file, the others in the error file."""
    EXPIRED = "expired"
    """Ended by its completion window. Finished lines are in the output file, the others in the error file."""


S = TypeVar("S", JobState, ShardState, AttemptState, RequestState, FireState, RevisionState, BatchState)
Table = Mapping[S, frozenset[S]]


def _table(kind: type[S], **moves: str) -> Table[S]:
    """Who may follow each state; nothing follows one that is left out."""
    return MappingProxyType({state: frozenset(map(kind, moves.get(state.value, "").split())) for state in kind})


JOB: Table[JobState] = _table(
    JobState,
    validating="queued failed cancelling",
    queued="in_progress finalizing cancelling failed",
    in_progress="finalizing cancelling failed",
    finalizing="completed failed",
    cancelling="completed cancelled expired failed",
    completed="queued validating",
    failed="queued validating",
    cancelled="queued validating",
    expired="queued validating",
)
SHARD: Table[ShardState] = _table(
    ShardState,
    ready="running cancelled",
    running="ready committed failed cancelled",
    failed="ready",
    cancelled="ready",
)
ATTEMPT: Table[AttemptState] = _table(
    AttemptState, running="succeeded failed lost released cancelled superseded", lost="superseded"
)
REQUEST: Table[RequestState] = _table(
    RequestState,
    pending="running cancelled expired failed",
    running="pending succeeded failed cancelled expired",
    failed="pending",
    cancelled="pending",
    expired="pending",
)
FIRE: Table[FireState] = _table(FireState, pending="submitted skipped empty failed")
REVISION: Table[RevisionState] = _table(
    RevisionState,
    draft="validated active retired",
    validated="draft active retired",
    active="retired",
    retired="validated active",
)
BATCH: Table[BatchState] = _table(
    BatchState,
    validating="in_progress failed cancelling expired",
    in_progress="finalizing cancelling expired",
    finalizing="completed cancelling expired",
    cancelling="cancelled",
)
_TABLES: Mapping[type[StrEnum], Table[Any]] = {
    JobState: JOB,
    ShardState: SHARD,
    AttemptState: ATTEMPT,
    RequestState: REQUEST,
    FireState: FIRE,
    RevisionState: REVISION,
    BatchState: BATCH,
}

TERMINAL_JOB = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
"""States in which a job rests: its output is final and nothing runs. Only a retry leaves them."""

TERMINAL_BATCH = frozenset(state for state, targets in BATCH.items() if not targets)
"""States that a batch never leaves."""

OPEN_SHARD = frozenset({ShardState.READY, ShardState.RUNNING})
"""States in which a shard still has work to come."""


def check(source: S, target: S) -> None:
    """Raise :class:`IllegalTransition` unless ``source`` may be followed by ``target``."""
    if target not in _TABLES[type(source)][source]:
        raise IllegalTransition(type(source).__name__.removesuffix("State").lower(), source, target)


def sources(target: S) -> list[S]:
    """The states that may be followed by ``target``: the guard of an update that moves rows there."""
    return [state for state, targets in _TABLES[type(target)].items() if target in targets]
