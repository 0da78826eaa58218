"""What a user sees of a job and of one of its rows: frozen values, safe to keep and to turn into JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from storage.states import TERMINAL_JOB, JobState, RequestState


class Phase(StrEnum):
    """What a job that has not ended is at."""

    UNPLANNED = "waiting for a planner"
    """No worker plans it now."""
    READING = "reading the input"
    """It is planned: files are found, converted where they are no Parquet, put in another order where asked for."""
    WAITING = "waiting for a worker"
    """Nobody is at work on it now."""
    RETRYING = "waiting to try again"
    """A shard failed; its next attempt is due later."""
    LOADING = "loading the engine"
    """Every attempt that runs waits for its engine."""
    COMPUTING = "computing"
    """Rows are computed."""
    PUBLISHING = "publishing"
    """All rows are there; the output is written."""
    STOPPING = "stopping"
    """It is being wound down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A job at one moment. Times are Unix seconds by the database's clock.

    ``rows_total`` are the job's rows, ``input_rows`` those of its whole input, of which ``limit`` and ``sample`` take
    some (``None`` before it is planned).
    ``rows_done`` counts finished rows, failed ones included, and the flushed rows of shards that still run;
    ``rows_resumed`` are rows that an attempt found finished by an earlier one. ``shards`` is keyed by ``ShardState``,
    ``tokens`` holds ``prompt_tokens``, ``cached_tokens`` and ``completion_tokens`` so far. ``stop_reason`` says why a
    job was wound down, ``error`` why it failed, ``message`` what a person should know or do. ``refused``: it failed
    because planning found that it cannot run.

    ``phase`` says what a job that has not ended waits for, or is at, since ``phase_seconds``.

    ``attended`` is false for a job that has not ended and that nobody works on, or would: in the embedded mode its
    process is gone, in a fleet no worker is alive for it. ``interrupted`` is true where such a process had begun.
    """

    id: str
    state: JobState
    tenant: str
    task: str
    model: str
    engine: str
    output: str
    input: tuple[str, ...]
    rows_total: int = 0
    input_rows: int | None = None
    rows_done: int = 0
    rows_failed: int = 0
    rows_resumed: int = 0
    shards: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    attempts: int = 0
    failures: int = 0
    losses: int = 0
    gen: int = 0
    stop_reason: str | None = None
    error: str | None = None
    refused: bool = False
    message: str | None = None
    phase: Phase | None = None
    phase_seconds: float | None = None
    attended: bool = True
    interrupted: bool = False
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    expires_at: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None

    @property
    def terminal(self) -> bool:
        """The job rests: its output is final and nothing of it runs. Only a retry changes that."""
        return self.state in TERMINAL_JOB

    @property
    def partial(self) -> bool:
        """The job rests, and its output lacks rows."""
        return self.terminal and self.rows_done < self.rows_total

    def to_json(self) -> dict[str, Any]:
        """Every field, and ``terminal`` and ``partial``, as plain JSON values."""
        return {**_plain(self), "terminal": self.terminal, "partial": self.partial}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """One row of a job. ``row`` counts from the start of the job's input; ``output`` is the file that holds the row.

    ``attempt`` is the number of the attempt that has, or had, the row; ``code`` and ``message`` are set when it failed.
    """

    job: str
    row: int
    state: RequestState
    shard: str
    attempt: int | None = None
    code: str | None = None
    message: str | None = None
    output: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Every field as a plain JSON value."""
        return _plain(self)


def _plain(value: JobStatus | RequestStatus) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in fields(value):
        attribute = getattr(value, item.name)
        if isinstance(attribute, StrEnum):
            attribute = attribute.value
        elif isinstance(attribute, Mapping):
            attribute = dict(attribute)
        elif isinstance(attribute, tuple):
            attribute = list(attribute)
        out[item.name] = attribute
    return out
