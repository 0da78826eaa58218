"""What the tables hold, as frozen dataclasses. Times are Unix seconds by the database's clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyroaring import BitMap

from storage.states import AttemptState, FireState, JobState, ShardState

TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")
"""Columns of token counters, of jobs and of shards; engines report them as result columns of these names."""
LONGEST_BACKOFF_SECONDS = 300.0
"""Most seconds that a shard waits after an attempt that failed."""
LONGEST_POSTPONEMENT_SECONDS = 30.0
"""Most seconds that a job waits after it could not be planned, or not be published."""


class Slice(NamedTuple):
    """A run of rows of one source file: rows ``[row_lo, row_lo + row_n)`` of source ``source``."""

    source: int
    row_lo: int
    row_n: int


@dataclass(frozen=True, slots=True)
class Source:
    """One input file, as it was when the job was planned.

    ``etag`` changes when the content does; ``partition`` holds the hive keys of its path as text, or null. ``rows`` is
    set for a file of our own that holds some rows of the input, in rising order: it says which.
    """

    idx: int
    uri: str
    etag: str
    n_bytes: int
    n_rows: int
    partition: Mapping[str, str | None] = field(default_factory=dict)
    rows: BitMap | None = None


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A contiguous run of the job's rows: ``row_n`` rows from ``row_start`` on, read from ``slices`` in order."""

    idx: int
    row_start: int
    row_n: int
    n_bytes: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class PartFile:
    """A flushed file of an attempt. ``seq`` ≥ 0 is a resume point; ``OUTPUT_SEQ`` is the shard's assembled output.

    ``rows`` are the row indices within the shard that the file holds, ``failed`` those of them that carry an error.
    """

    attempt_no: int
    seq: int
    uri: str
    n_bytes: int
    sha256: str
    etag: str
    rows: BitMap
    failed: BitMap


OUTPUT_SEQ = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What a job is submitted with. ``model``: the registered revision that it names; ``None`` for a path."""

    id: str
    tenant: str
    priority: int
    queue: str
    engine: str
    engine_key: str
    spec: Mapping[str, Any]
    spec_hash: str
    idempotency_key: str | None
    output_uri: str
    max_failed_rows: int | None
    model: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(NewJob):
    """One job. ``rows_*`` and ``tokens`` count committed shards only; what running ones have flushed is in the shards.

    ``gen`` counts its retries. ``n_open`` shards are still to end, ``n_failed_shards`` of the ended ones failed.
    ``stop_reason`` is set when the job is being wound down (or was): ``"cancelled"``, ``"expired"``,
    ``"max_failed_rows"``, ``"failed"``. ``publishing``: this job has begun to replace whatever was published at its
    output; ``needs_republish``: a finalizer without its lease may have disturbed that since.
    """

    state: JobState
    plan: Mapping[str, Any]
    stop_reason: str | None
    error: str | None
    gen: int
    n_shards: int
    n_open: int
    n_failed_shards: int
    rows_total: int
    rows_done: int
    rows_failed: int
    tokens: Mapping[str, int] = field(metadata={"columns": TOKENS})
    finalize_epoch: int
    publishing: bool
    needs_republish: bool
    created_at: float
    started_at: float | None
    ended_at: float | None
    expires_at: float | None
    cancel_requested_at: float | None


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous run of the job's rows. ``select`` limits it to some of them (a retry); ``None`` means all.

    ``done`` and ``failed`` are row indices within the shard that some attempt has flushed. ``n_crash`` counts the
    attempts in a row that took their engine or their worker down without progress; ``suspect`` are the rows that the
    last of them ran alone.
    """

    id: str
    job_id: str
    idx: int
    gen: int
    state: ShardState
    row_start: int
    row_n: int
    slices: tuple[Slice, ...]
    select: BitMap | None
    done: BitMap
    failed: BitMap
    attempt_no: int
    committed_attempt: int | None
    n_fail: int
    n_lost: int
    n_crash: int
    suspect: BitMap | None
    run_after: float
    lease_owner: str | None
    lease_until: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Claim:
    """A shard leased to this worker: everything that ``run_shard`` needs, read in the claiming transaction.

    ``attempt_no`` is the fence: every later write for this attempt carries it, and a write that finds another number
    changes nothing. ``parts`` are the verified part files of this and of earlier attempts, oldest first.
    ``previous_output`` is what its rows' last committed shard of an earlier generation (``gen``) wrote.
    """

    shard: Shard
    job: Job
    sources: Mapping[int, Source]
    parts: tuple[PartFile, ...]
    previous_output: PartFile | None
    attempt_no: int
    owner: str

    @property
    def todo(self) -> BitMap:
        """Row indices within the shard that no earlier attempt has flushed."""
        wanted = BitMap(range(self.shard.row_n)) if self.shard.select is None else self.shard.select
        return wanted - self.shard.done


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a shard. ``rows_resumed`` were already flushed when it began; ``rows_computed`` it flushed itself."""

    shard_id: str
    attempt_no: int
    worker_id: str
    state: AttemptState
    started_at: float
    ended_at: float | None
    rows_resumed: int
    rows_computed: int
    stats: Mapping[str, Any]
    error: str | None


@dataclass(frozen=True, slots=True)
class RowException:
    """One failed row: ``row`` counts from the start of the job's input."""

    row: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Computed:
    """What is counted of rows in addition to their number: ``tokens`` by kind, and the rows that have failed."""

    tokens: Mapping[str, int]
    exceptions: tuple[RowException, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the audit trail: ``type`` is ``"job.queued"``, ``"shard.running"``, ``"shard.flush"``, …"""

    id: int
    job_id: str
    shard_id: str | None
    attempt_no: int | None
    type: str
    at: float
    actor: str
    data: Mapping[str, Any]


class FireKey(NamedTuple):
    """Names one fire: a schedule, and the Unix second at which it came due."""

    schedule_id: str
    fire_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSchedule:
    """What a schedule is made of. ``spec`` holds the job's fields, with templates in input and output.

    ``misfire_grace`` is in seconds; ``None`` is no limit. ``next_at`` is when it comes due next, unless it is paused.
    """

    id: str
    tenant: str
    name: str
    cron: str
    tz: str
    spec: Mapping[str, Any]
    overlap: str
    misfire: str
    misfire_grace: float | None
    incremental: bool
    next_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(NewSchedule):
    """A job that is submitted again and again."""

    paused: bool
    created_at: float


@dataclass(frozen=True, slots=True)
class Fire:
    """One time at which a schedule came due. ``missed`` times before it were passed over in its favour.

    ``decided_at`` is when a tick noticed it, ``settled_at`` when it left ``pending``. ``reason`` says why it was
    skipped or has failed, or what a pending one waits for.
    """

    schedule_id: str
    fire_at: float
    state: FireState
    job_id: str | None
    job_state: JobState | None
    reason: str | None
    missed: int
    decided_at: float
    settled_at: float | None

    @property
    def key(self) -> FireKey:
        return FireKey(self.schedule_id, self.fire_at)
