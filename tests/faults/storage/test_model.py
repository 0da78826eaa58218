"""The storage layer against a model of it in plain Python: any order of calls, after each of which both must agree.

Hypothesis chooses the calls and shrinks what fails to the shortest history. The model knows no SQL, no fence and no
lock: it says what must be true. Every call is also made by attempts and finalizers that have lost what they held, and
then nothing may change but the note that they came back.

Liveness: whatever a history did, its faults end, one lease passes, and then every job ends by the calls of one tick.
Each that did not complete does so by one retry. No row that was flushed is computed again.

``HYPOTHESIS_PROFILE=thorough`` (``make thorough``) takes many more and longer histories, other ones every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pyroaring import BitMap

from storage.errors import Conflict, IllegalTransition, LeaseLost
from storage.fleet import clock_steps, garbage, workers
from storage.fleet.workers import Worker
from storage.queue import attempts as shards
from storage.queue import claims, job_progress, jobs, plan_leases, publish_leases, reaper
from storage.queue import reopen as retries
from storage.queue.claims import Lease
from storage.records import (
    LONGEST_BACKOFF_SECONDS,
    LONGEST_POSTPONEMENT_SECONDS,
    OUTPUT_SEQ,
    Claim,
    Job,
    NewJob,
    PartFile,
    RowException,
    ShardPlan,
    Slice,
    Source,
)
from storage.sql import tables
from storage.sql.database import Database, now
from storage.states import OPEN_SHARD, TERMINAL_JOB, AttemptState, JobState, ShardState
from tests.examples import PROFILE

_ALWAYS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
_ALWAYS |= {"report_multiple_bugs": False}
PROFILES = {
    "default": settings(max_examples=40, stateful_step_count=50, derandomize=True, database=None, **_ALWAYS),
    "thorough": settings(max_examples=1500, stateful_step_count=80, **_ALWAYS),
}

OWNERS = ("ada", "bob")
BACKOFF, POSTPONED = LONGEST_BACKOFF_SECONDS, LONGEST_POSTPONEMENT_SECONDS
OUTPUTS = ("/out/x", "/out/y", "/out/z")
LEASE = 3600.0
MAX_LOSSES = MAX_FAILURES = 2
"""Fewer than ``CAREFUL_AFTER``: the search for a poison row is not part of this model."""

TIMES = {
    tables.shard.c.run_after: BACKOFF,
    tables.shard.c.lease_until: LEASE,
    tables.job.c.finalize_until: LEASE,
    tables.worker.c.heartbeat_at: 0.0,
    tables.gc_queue.c.not_before: garbage.LONGEST_DELAY_SECONDS,
}
"""Every stored time that something may wait for, and how far ahead it may lie."""
WAITED_FOR = dict.fromkeys(TIMES, sa.true()) | {tables.shard.c.run_after: tables.shard.c.state.in_(OPEN_SHARD)}

Event = tuple[str, str | None, int | None, str]
"""Job, shard, attempt, type."""


@dataclass
class ShardModel:
    id: str
    idx: int
    gen: int
    row_n: int
    select: frozenset[int] | None = None
    state: ShardState = ShardState.READY
    done: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    attempt_no: int = 0
    owner: str | None = None
    lapsed: bool = False
    committed: int | None = None
    n_fail: int = 0
    n_lost: int = 0
    run_after: float = 0.0
    waiting: bool = False
    tokens: int = 0

    @property
    def wanted(self) -> set[int]:
        return set(range(self.row_n)) if self.select is None else set(self.select)

    @property
    def todo(self) -> set[int]:
        return self.wanted - self.done


@dataclass
class JobModel:
    id: str
    output: str
    key: str | None
    priority: int
    max_failed: int | None
    overdue: bool
    state: JobState = JobState.VALIDATING
    planned: bool = False
    counted_rows: list[int] = field(default_factory=list)
    gen: int = 0
    stop_reason: str | None = None
    shards: dict[str, ShardModel] = field(default_factory=dict)
    epoch: int = 0
    finalizer: str | None = None
    """Who publishes it, or plans it."""
    finalizer_lives: bool = False
    """Its lease has not run out; without a finalizer: the job was given back, and waits a while."""
    n_lost: int = 0
    publishing: bool = False
    reopening: bool | None = None
    """A retry waits for a planner; whether of failed rows only."""

    @property
    def newest(self) -> list[ShardModel]:
        """The shard of the highest generation at every position."""
        found: dict[int, ShardModel] = {}
        for item in sorted(self.shards.values(), key=lambda s: (s.idx, s.gen)):
            found[item.idx] = item
        return list(found.values())

    @property
    def n_open(self) -> int:
        return sum(item.state in OPEN_SHARD for item in self.shards.values())

    @property
    def n_failed_shards(self) -> int:
        return sum(item.state is ShardState.FAILED for item in self.shards.values())

    @property
    def rows_done(self) -> int:
        """Rows of the committed shards, less those that a later generation has taken back and not committed yet."""
        whole = {item.idx: item.row_n for item in self.shards.values() if item.state is ShardState.COMMITTED}
        taken = sum(len(item.wanted) for item in self.newest if item.idx in whole and item.state != "committed")
        return sum(whole.values()) - taken

    @property
    def rows_failed(self) -> int:
        return sum(len(item.failed) for item in self.newest if item.state is ShardState.COMMITTED)

    @property
    def whole(self) -> bool:
        """Every row is done, and no more of them failed than may."""
        few = self.max_failed is None or self.rows_failed <= self.max_failed
        committed = all(item.state is ShardState.COMMITTED for item in self.newest)
        return self.planned and committed and few

    @property
    def tokens(self) -> int:
        """Paid for once each, so those of earlier generations stay."""
        return sum(item.tokens for item in self.shards.values() if item.state is ShardState.COMMITTED)


@dataclass
class AttemptModel:
    owner: str
    resumed: int
    state: AttemptState = AttemptState.RUNNING
    computed: int = 0


class StorageMachine(RuleBasedStateMachine):
    """Each rule calls the storage layer and does the same to the model; the invariant compares all of it."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        with database.write() as connection:
            for table in (tables.job, tables.gc_queue, tables.worker, tables.tenant_usage):
                connection.execute(table.delete())
            self.first_event = connection.execute(sa.select(sa.func.max(tables.event.c.id))).scalar() or 0
        self.jobs: dict[str, JobModel] = {}
        self.attempts: dict[tuple[str, int], AttemptModel] = {}
        self.parts: dict[tuple[str, int, int], tuple[set[int], set[int]]] = {}
        self.exceptions: dict[tuple[str, int], str] = {}
        self.events: list[Event] = []
        self.claims: list[Claim] = []
        self.finalizers: list[Job] = []
        self.seen: dict[str, int] = {}
        self.registered: set[str] = set()
        self.settled: dict[tuple[str, int], set[int]] = {}
        self.agreed = True

    # What is there to choose from.

    def shards(self) -> Iterator[tuple[JobModel, ShardModel]]:
        return ((job, shard) for job in self.jobs.values() for shard in job.shards.values())

    def shard(self, claim: Claim) -> ShardModel:
        return self.jobs[claim.job.id].shards[claim.shard.id]

    def is_held(self, claim: Claim) -> bool:
        shard = self.shard(claim)
        return shard.state is ShardState.RUNNING and shard.attempt_no == claim.attempt_no

    def held(self) -> list[Claim]:
        return [claim for claim in self.claims if self.is_held(claim)]

    def stale(self) -> list[Claim]:
        """Those whose shard another attempt has by now, if there are such: there they could do most harm."""
        found = [claim for claim in self.claims if not self.is_held(claim)]
        return [claim for claim in found if self.shard(claim).state is ShardState.RUNNING] or found

    def busy(self) -> bool:
        return bool(self.held() or self.claimable())

    def attempt(self, pick: int) -> Claim:
        """One that holds its shard; it may be a new one."""
        held, ready = self.held(), self.claimable()
        if not held or (ready and pick % 2):
            held = [self.take(OWNERS[pick // 2 % 2], LEASE, None, ready[0])]
        return held[pick % len(held)]

    def in_state(self, *states: JobState) -> list[JobModel]:
        return [job for job in self.jobs.values() if job.state in states]

    # How the model moves.

    def note(self, job: JobModel, kind: str, shard: ShardModel | None = None, attempt_no: int | None = None) -> None:
        self.events.append((job.id, None if shard is None else shard.id, attempt_no, kind))

    def move_job(self, job: JobModel, state: JobState) -> None:
        job.state = state
        self.note(job, f"job.{state}")

    def move_shard(self, job: JobModel, shard: ShardModel, state: ShardState) -> None:
        shard.state = state
        if state is not ShardState.RUNNING:
            shard.owner, shard.lapsed = None, False
        self.note(job, f"shard.{state}", shard, shard.attempt_no)

    def end(self, shard: ShardModel, state: AttemptState) -> None:
        self.attempts[shard.id, shard.attempt_no].state = state

    def let_go(self, job: JobModel) -> None:
        job.finalizer, job.finalizer_lives = None, False

    def closed(self, job: JobModel) -> None:
        """One more of the job's shards has ended."""
        if job.state is not JobState.IN_PROGRESS:
            return
        if job.max_failed is not None and job.rows_failed > job.max_failed:
            job.stop_reason = "max_failed_rows"
            self.move_job(job, JobState.CANCELLING)
        elif job.n_open == 0:
            self.move_job(job, JobState.FINALIZING)

    def lose(self, job: JobModel, shard: ShardModel) -> None:
        attempt = self.attempts[shard.id, shard.attempt_no]
        shard.n_lost = 0 if attempt.computed else shard.n_lost + 1
        dead = shard.n_lost >= MAX_LOSSES
        self.move_shard(job, shard, ShardState.FAILED if dead else ShardState.READY)
        attempt.state = AttemptState.LOST
        if dead:
            if job.state in (JobState.QUEUED, JobState.IN_PROGRESS) and not any(
                one.done for one in job.shards.values()
            ):
                # No attempt of this model says that rows were inside: each of the other shards would end so, too.
                job.stop_reason = "failed"
                self.move_job(job, JobState.CANCELLING)
            self.closed(job)

    def read_due(self, job: JobModel) -> None:
        """When a shard is due is the database's clock's business; the order that follows is the model's."""
        table = tables.shard
        with self.database.read() as connection:
            for row in connection.execute(sa.select(table.c.id, table.c.run_after).where(table.c.job_id == job.id)):
                job.shards[row.id].run_after = row.run_after

    def cancel_all_ready(self, job: JobModel, batch: int = 1000) -> int:
        ready = sorted(s.id for s in job.shards.values() if s.state is ShardState.READY)[:batch]
        for name in ready:
            job.shards[name].state = ShardState.CANCELLED
            self.note(job, "shard.cancelled", job.shards[name])
        return len(ready)

    def claimable(self) -> list[ShardModel]:
        """What may be claimed, best first."""
        found = [
            (-job.priority, shard.run_after, shard.id, shard)
            for job, shard in self.shards()
            if shard.state is ShardState.READY
            and not shard.waiting
            and job.state in (JobState.QUEUED, JobState.IN_PROGRESS)
        ]
        return [item[-1] for item in sorted(found, key=lambda item: item[:-1])]

    # Jobs.

    @precondition(lambda self: len(self.jobs) < 4)
    @rule(
        output=st.sampled_from(OUTPUTS),
        key=st.sampled_from([None, None, "k"]),
        work=st.sampled_from(["work", "work", "other"]),
        priority=st.sampled_from([0, 0, 1]),
        max_failed=st.sampled_from([None, None, 1]),
        overdue=st.booleans(),
    )
    def submit(
        self, output: str, key: str | None, work: str, priority: int, max_failed: int | None, overdue: bool
    ) -> None:
        self.agreed = False
        job_id = f"job-{len(self.jobs):04d}"

        def insert() -> Job:
            new = NewJob(
                id=job_id, tenant="t", priority=priority, queue="q", engine="fake", engine_key="e", spec={},
                spec_hash=work, idempotency_key=key, output_uri=output, max_failed_rows=max_failed,
            )  # fmt: skip
            return jobs.insert(self.database, new, window_seconds=-1.0 if overdue else LEASE, actor="client")

        same = next((job for job in self.jobs.values() if key is not None and job.key == key + work), None)
        other = any(job.key is not None and job.key[0] == key for job in self.jobs.values())
        taken = any(job.output == output and job.state not in TERMINAL_JOB for job in self.jobs.values())
        if same is not None:
            assert insert().id == same.id
        elif other or taken:
            with pytest.raises(Conflict):
                insert()
        else:
            assert insert().state is JobState.VALIDATING
            model = JobModel(job_id, output, None if key is None else key + work, priority, max_failed, overdue)
            self.jobs[job_id] = model
            self.note(model, "job.validating")

    @initialize(
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        max_failed=st.sampled_from([None, None, 2]),
        bad=st.integers(0, 15),
        state=st.sampled_from(["planned", "published", "stopped"]),
    )
    def one_job_is_there(self, sizes: list[int], max_failed: int | None, bad: int, state: str) -> None:
        """Planned, published with some failed rows, or cancelled and published half done."""
        self.submit(OUTPUTS[0], None, "work", 0, max_failed, False)
        self.plan_one(self.jobs["job-0000"], sizes)
        if state == "published":
            self.run("ada", bad, True)
            self.calm_down()
        elif state == "stopped":
            self.flush(self.attempt(0), 1, bad)
            self.cancel(0, "cancelled", 0)
            self.cancel_attempt(0)
            self.calm_down()

    @precondition(lambda self: self.in_state(JobState.VALIDATING))
    @rule(pick=st.integers(0, 9), sizes=st.lists(st.integers(1, 4), max_size=3))
    def plan(self, pick: int, sizes: list[int]) -> None:
        self.agreed = False
        self.plan_one(_pick(self.in_state(JobState.VALIDATING) or list(self.jobs.values()), pick), sizes)

    def plan_one(self, job: JobModel, sizes: list[int]) -> None:
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        plans = [ShardPlan(n, starts[n], size, 8, (Slice(0, starts[n], size),)) for n, size in enumerate(sizes)]

        def call() -> Job:
            source = Source(0, "/in", "etag", 8, sum(sizes))
            return jobs.set_planned(
                self.database, job.id, plan={"planned": True}, sources=[source], shards=plans, actor="planner"
            )

        def again() -> Job:
            return retries.planned_again(self.database, job.id, [], [], actor="planner")

        if job.reopening is not None and job.state is JobState.VALIDATING:
            again()
            failed_only, job.reopening = job.reopening, None
            job.n_lost = 0
            self.let_go(job)
            self.reopen(job, failed_only)
            return
        with pytest.raises(IllegalTransition):
            again()
        if job.state is not JobState.VALIDATING:
            with pytest.raises(IllegalTransition):
                call()
            return
        call()
        self.let_go(job)
        job.planned, job.n_lost = True, 0
        job.counted_rows += sizes
        for item in plans:
            name = jobs.shard_id(job.id, 0, item.idx)
            job.shards[name] = ShardModel(name, item.idx, 0, item.row_n)
        self.read_due(job)
        self.move_job(job, JobState.QUEUED)
        if not plans:
            self.move_job(job, JobState.FINALIZING)

    @precondition(lambda self: self.in_state(JobState.VALIDATING))
    @rule(pick=st.integers(0, 9))
    def refuse(self, pick: int) -> None:
        self.agreed = False
        job = _pick(self.in_state(JobState.VALIDATING), pick)
        self.refuse_one(job)

    def refuse_one(self, job: JobModel) -> None:
        jobs.refuse(self.database, job.id, "no", actor="planner")
        self.let_go(job)
        self.move_job(job, JobState.FAILED)

    @precondition(lambda self: self.in_state(JobState.VALIDATING))
    @rule(owner=st.sampled_from(OWNERS), lapsed=st.booleans(), gives_up=st.booleans())
    def claim_to_plan(self, owner: str, lapsed: bool, gives_up: bool) -> None:
        self.agreed = False
        self.register(owner)
        waiting = self.by_turn(job for job in self.in_state(JobState.VALIDATING) if not job.finalizer_lives)
        found = plan_leases.claim(self.database, owner=f"{owner}#1", lease_seconds=-1.0 if lapsed else LEASE)
        assert (found and found.id) == (waiting[0].id if waiting else None)
        if waiting:
            job = waiting[0]
            job.finalizer, job.finalizer_lives = f"{owner}#1", not lapsed
            if gives_up:
                plan_leases.postpone(self.database, job.id, owner=f"{owner}#1", error="no answer", delay=POSTPONED)
                job.finalizer, job.finalizer_lives = None, True

    def by_turn(self, found: Iterable[JobModel]) -> list[JobModel]:
        """First what nobody has tried, then what was given up longest ago: that is the database's clock's business."""
        table = tables.job
        with self.database.read() as connection:
            until = dict(connection.execute(sa.select(table.c.id, table.c.finalize_until)).all())
        return sorted(found, key=lambda job: (until[job.id] is not None, until[job.id] or 0.0, job.id))

    @precondition(lambda self: self.jobs)
    @rule(pick=st.integers(0, 9), reason=st.sampled_from(["cancelled", "expired"]), sure=st.integers(0, 2))
    def cancel(self, pick: int, reason: str, sure: int) -> None:
        """Not each time that it is chosen: else few jobs get far."""
        self.agreed = False
        if sure:
            return
        job = _pick(list(self.jobs.values()), pick)
        if job.state in TERMINAL_JOB:
            with pytest.raises(IllegalTransition):
                jobs.request_stop(self.database, job.id, reason, actor="client")
            return
        jobs.request_stop(self.database, job.id, reason, actor="client")
        if job.state is JobState.FINALIZING:
            return  # there is nothing to stop
        if job.state is not JobState.CANCELLING:
            job.stop_reason = reason
            self.let_go(job)
            self.move_job(job, JobState.CANCELLING)
        self.cancel_all_ready(job)

    @precondition(lambda self: any(shard.state is ShardState.READY for _, shard in self.shards()))
    @rule(pick=st.integers(0, 9), batch=st.integers(1, 2))
    def cancel_ready(self, pick: int, batch: int) -> None:
        self.agreed = False
        job = _pick(self.in_state(JobState.CANCELLING) or list(self.jobs.values()), pick)
        expected = self.cancel_all_ready(job, batch) if job.state is JobState.CANCELLING else 0
        assert jobs.cancel_ready(self.database, job.id, actor="client", batch=batch) == expected

    @precondition(lambda self: self.in_state(*TERMINAL_JOB))
    @rule(pick=st.integers(0, 9), failed_only=st.booleans(), overdue=st.booleans(), plan_again=st.booleans())
    def retry(self, pick: int, failed_only: bool, overdue: bool, plan_again: bool) -> None:
        self.agreed = False
        job = _pick(self.in_state(*TERMINAL_JOB) if pick < 9 else list(self.jobs.values()), pick)
        self.retry_one(job, failed_only, overdue=overdue, plan_again=plan_again)

    def retry_one(self, job: JobModel, failed_only: bool, *, overdue: bool = False, plan_again: bool = False) -> None:
        def call() -> Job:
            window = -1.0 if overdue else LEASE
            return retries.reopen(
                self.database, job.id, failed_only=failed_only, window_seconds=window, actor="client",
                plan_again=plan_again,
            )  # fmt: skip

        nothing = job.state is JobState.COMPLETED and failed_only and not (job.n_failed_shards or job.rows_failed)
        if job.state not in TERMINAL_JOB or self.is_overtaken(job) or nothing:
            with pytest.raises(Conflict):
                call()
            return
        call()
        job.stop_reason, job.overdue, job.epoch, job.n_lost = None, overdue, job.epoch + 1, 0
        self.let_go(job)
        if plan_again or not job.planned:
            job.reopening = failed_only if job.planned else None
            self.move_job(job, JobState.VALIDATING)
        else:
            self.reopen(job, failed_only)

    def is_overtaken(self, job: JobModel) -> bool:
        """A newer job has its output."""
        return any(other.output == job.output and other.id > job.id for other in self.jobs.values())

    def reopen(self, job: JobModel, failed_only: bool) -> None:
        ended = (ShardState.FAILED, ShardState.CANCELLED)
        again = [s for s in job.newest if s.state in ended or s.failed or not failed_only]
        job.gen += 1
        rows_again = 0
        for shard in again:
            if shard.state in ended:
                shard.n_fail, shard.n_lost, shard.waiting = 0, 0, False
                if not failed_only:
                    rows_again += shard.row_n - len(shard.wanted)
                    shard.select = None
                self.move_shard(job, shard, ShardState.READY)
            else:
                rows_again += len(shard.failed) if failed_only else shard.row_n
                name = jobs.shard_id(job.id, job.gen, shard.idx)
                select = frozenset(shard.failed) if failed_only else None
                job.shards[name] = ShardModel(name, shard.idx, job.gen, shard.row_n, select)
        job.counted_rows.append(rows_again)
        self.read_due(job)
        self.move_job(job, JobState.QUEUED)
        if not again:
            self.move_job(job, JobState.FINALIZING)

    @precondition(lambda self: any(shard.done and shard.state == "cancelled" for _, shard in self.shards()))
    @rule(pick=st.integers(0, 9))
    def garbage_is_collected(self, pick: int) -> None:
        """The parts of shards that were not finished go, and with them what is known of their rows."""
        self.agreed = False
        job = _pick(self.in_state(*TERMINAL_JOB) or list(self.jobs.values()), pick)
        ended = job.state in TERMINAL_JOB
        assert garbage.give_up(self.database, garbage.Garbage("/work", job.id, 0.0)) is ended
        for shard in job.shards.values():
            if ended and shard.state in (ShardState.FAILED, ShardState.CANCELLED):
                shard.done, shard.failed, shard.tokens = set(), set(), 0
                self.parts = {key: part for key, part in self.parts.items() if key[0] != shard.id}
                self.exceptions = {key: code for key, code in self.exceptions.items() if key[0] != shard.id}

    @precondition(lambda self: any(job.overdue for job in self.jobs.values()))
    @rule()
    def overdue_jobs_are_found(self) -> None:
        self.agreed = False
        late = self.in_state(JobState.VALIDATING, JobState.QUEUED, JobState.IN_PROGRESS)
        assert set(jobs.expired(self.database)) == {job.id for job in late if job.overdue}

    # Attempts.

    @precondition(lambda self: any(shard.state is ShardState.READY for _, shard in self.shards()))
    @rule(owner=st.sampled_from(OWNERS), lapsed=st.booleans(), own_job=st.booleans(), pick=st.integers(0, 9))
    def claim(self, owner: str, lapsed: bool, own_job: bool, pick: int) -> None:
        self.agreed = False
        expected = self.claimable()
        job_id = _pick(list(self.jobs), pick) if own_job and self.jobs else None
        if job_id is not None:
            expected = [shard for shard in expected if shard.id in self.jobs[job_id].shards]
        lease = -1.0 if lapsed else LEASE
        if expected:
            self.take(owner, lease, job_id, expected[0])
        else:
            assert claims.claim(self.database, owner=owner, lease_seconds=lease, queues=["q"], job_id=job_id) is None

    def take(self, owner: str, lease: float, job_id: str | None, shard: ShardModel) -> Claim:
        self.register(owner)
        claim = claims.claim(self.database, owner=owner, lease_seconds=lease, queues=["q"], job_id=job_id)
        assert claim is not None
        assert claim.shard.id == shard.id
        job = self.jobs[claim.job.id]
        shard.attempt_no, shard.owner, shard.lapsed = shard.attempt_no + 1, owner, lease < 0
        self.attempts[shard.id, shard.attempt_no] = AttemptModel(owner, len(shard.done))
        self.move_shard(job, shard, ShardState.RUNNING)
        if job.state is JobState.QUEUED:
            self.move_job(job, JobState.IN_PROGRESS)
        assert (claim.attempt_no, set(claim.todo)) == (shard.attempt_no, shard.todo)
        flushed = {key[1:]: rows for key, (rows, _) in self.parts.items() if key[0] == shard.id}
        assert {(p.attempt_no, p.seq): set(p.rows) for p in claim.parts} == flushed
        below = [s for s in job.shards.values() if s.idx == shard.idx and s.gen < shard.gen and s.committed]
        base = max(below, key=lambda s: s.gen, default=None)
        assert (claim.previous_output and claim.previous_output.uri) == (
            base and _uri(base.id, base.committed or 0, OUTPUT_SEQ)
        )
        self.claims.append(claim)
        return claim

    @precondition(lambda self: self.claims)
    @rule(pick=st.integers(0, 99), alone=st.booleans())
    def heartbeat(self, pick: int, alone: bool) -> None:
        """Of one attempt, whatever became of it, or of all that its worker ever had."""
        self.agreed = False
        one = _pick((self.stale() if alone else []) or self.claims, pick)
        mine = [one] if alone else [claim for claim in self.claims if claim.owner == one.owner]
        held = [(claim.shard.id, claim.attempt_no) for claim in mine]
        expected = {}
        for claim in mine:
            stopping = self.jobs[claim.job.id].state is JobState.CANCELLING
            lease = Lease.LOST if not self.is_held(claim) else Lease.STOPPING if stopping else Lease.HELD
            expected[claim.shard.id, claim.attempt_no] = lease
            if lease is not Lease.LOST:
                self.shard(claim).lapsed = False
        assert claims.heartbeat(self.database, held, owner=one.owner, lease_seconds=LEASE) == expected

    @precondition(busy)
    @rule(
        pick=st.integers(0, 9),
        what=st.sampled_from(["flush", "flush", "finish", "finish", "fail", "fail", "wait", "fail_job", "release"]),
        rows=st.integers(1, 15),
        bad=st.integers(0, 15),
    )
    def an_attempt_goes_on(self, pick: int, what: str, rows: int, bad: int) -> None:
        """``wait``: it fails, and its shard waits before it is tried again."""
        self.agreed = False
        claim = self.attempt(pick)
        match what:
            case "flush":
                self.flush(claim, rows, bad)
            case "finish":
                self.commit_whole(claim, bad)
            case "fail" | "wait":
                self.fail(claim, what == "wait")
            case "fail_job":
                self.fail_job(claim)
            case "release":
                self.release(claim)

    def flush(self, claim: Claim, rows: int, bad: int) -> None:
        todo = sorted(self.shard(claim).todo)
        if not todo:
            return
        chosen = [row for row in todo if rows >> row & 1] or todo[:1]
        self.flushed(claim, chosen, [row for row in chosen if bad >> row & 1], rows)

    def flushed(self, claim: Claim, rows: list[int], failed: list[int], tokens: int) -> None:
        job, shard = self.jobs[claim.job.id], self.shard(claim)
        seq = sum(key[:2] == (shard.id, claim.attempt_no) for key in self.parts)
        exceptions = [RowException(row, "code", "why") for row in failed]
        part = _part(claim, seq, rows, failed)
        shards.flush(self.database, claim, part, tokens={"prompt_tokens": tokens}, exceptions=exceptions)
        assert not set(rows) & self.settled.get((job.id, shard.idx), set()), "a flushed row is computed again"
        self.parts[shard.id, claim.attempt_no, seq] = set(rows), set(failed)
        self.exceptions |= {(shard.id, row): "code" for row in failed}
        self.attempts[shard.id, claim.attempt_no].computed += len(rows)
        shard.done |= set(rows)
        shard.failed |= set(failed)
        shard.tokens += tokens
        self.note(job, "shard.flush", shard, claim.attempt_no)

    def commit_whole(self, claim: Claim, bad: int = 0) -> None:
        """``bad``: bits of the rows that fail."""
        job, shard = self.jobs[claim.job.id], self.shard(claim)
        if shard.todo:
            self.flushed(claim, sorted(shard.todo), [row for row in shard.todo if bad >> row & 1], 1)
        output = _part(claim, OUTPUT_SEQ, range(shard.row_n), shard.failed)
        state = shards.commit(self.database, claim, output, stats={"engine": {}})
        self.parts[shard.id, claim.attempt_no, OUTPUT_SEQ] = set(range(shard.row_n)), set(shard.failed)
        shard.committed = claim.attempt_no
        self.move_shard(job, shard, ShardState.COMMITTED)
        self.end(shard, AttemptState.SUCCEEDED)
        self.closed(job)
        assert state is job.state

    @precondition(lambda self: self.claimable())
    @rule(owner=st.sampled_from(OWNERS), bad=st.integers(0, 15), all_of_them=st.booleans())
    def run(self, owner: str, bad: int, all_of_them: bool) -> None:
        """A worker that nothing happens to: it takes the next shard, or one after the other, to its commit."""
        self.agreed = False
        while ready := self.claimable():
            self.commit_whole(self.take(owner, LEASE, None, ready[0]), bad)
            if not all_of_them:
                return

    def fail(self, claim: Claim, waits: bool) -> None:
        job, shard = self.jobs[claim.job.id], self.shard(claim)
        shard.n_fail += 1
        target = ShardState.FAILED if shard.n_fail >= MAX_FAILURES else ShardState.READY
        delay = BACKOFF if waits else 0.0
        assert shards.fail(self.database, claim, "oh", delay=delay, max_failures=MAX_FAILURES) is target
        self.read_due(job)
        shard.waiting = waits
        self.move_shard(job, shard, target)
        self.end(shard, AttemptState.FAILED)
        if target is ShardState.FAILED:
            self.closed(job)

    def fail_job(self, claim: Claim) -> None:
        job, shard = self.jobs[claim.job.id], self.shard(claim)
        shards.fail_job(self.database, claim, "its input changed")
        self.move_shard(job, shard, ShardState.FAILED)
        self.end(shard, AttemptState.FAILED)
        if job.state is JobState.IN_PROGRESS:
            job.stop_reason = "failed"
            self.move_job(job, JobState.CANCELLING)

    def release(self, claim: Claim) -> None:
        shards.release(self.database, claim)
        shard = self.shard(claim)
        self.move_shard(self.jobs[claim.job.id], shard, ShardState.READY)
        self.read_clock()
        self.end(shard, AttemptState.RELEASED)

    @precondition(lambda self: any(c for c in self.held() if self.jobs[c.job.id].state is JobState.CANCELLING))
    @rule(pick=st.integers(0, 9))
    def cancel_attempt(self, pick: int) -> None:
        """What an attempt does whose heartbeat told it that the job is being wound down."""
        self.agreed = False
        claim = _pick([c for c in self.held() if self.jobs[c.job.id].state is JobState.CANCELLING], pick)
        shards.cancel(self.database, claim)
        self.move_shard(self.jobs[claim.job.id], self.shard(claim), ShardState.CANCELLED)
        self.end(self.shard(claim), AttemptState.CANCELLED)

    @precondition(lambda self: any(job.max_failed is not None for job in self.in_state(JobState.IN_PROGRESS)))
    @rule(pick=st.integers(0, 9))
    def stop_if_too_many_failed(self, pick: int) -> None:
        self.agreed = False
        job = _pick(list(self.jobs.values()), pick)
        flushed = sum(len(s.failed) for s in job.shards.values() if s.state is not ShardState.COMMITTED)
        stop = (
            job.state is JobState.IN_PROGRESS
            and job.max_failed is not None
            and job.rows_failed + flushed > job.max_failed
        )
        assert job_progress.stop_if_too_many_failed(self.database, job.id, "worker") is stop
        if stop:
            job.stop_reason = "max_failed_rows"
            self.move_job(job, JobState.CANCELLING)

    # Those who lost what they held.

    @precondition(lambda self: self.stale())
    @rule(
        pick=st.integers(0, 99),
        what=st.sampled_from(["commit", "commit", "flush", "fail", "fail_job", "release", "cancel"]),
    )
    def a_stale_attempt_goes_on(self, pick: int, what: str) -> None:
        self.agreed = False
        claim = _pick(self.stale(), pick)
        job, shard = self.jobs[claim.job.id], self.shard(claim)
        output = _part(claim, OUTPUT_SEQ, range(shard.row_n), [])
        calls: dict[str, Callable[[], object]] = {
            "commit": lambda: shards.commit(self.database, claim, output, stats={}),
            "flush": lambda: shards.flush(
                self.database, claim, _part(claim, 99, [0], [0]), tokens={}, exceptions=[RowException(0, "c", "m")]
            ),
            "fail": lambda: shards.fail(self.database, claim, "late", delay=0.0, max_failures=1),
            "fail_job": lambda: shards.fail_job(self.database, claim, "late"),
            "release": lambda: shards.release(self.database, claim),
            "cancel": lambda: shards.cancel(self.database, claim),
        }
        if what == "commit" and shard.committed == claim.attempt_no:
            # Not late but twice, as after a COMMIT whose answer was lost: told that it is in.
            assert calls[what]() is job.state
            return
        with pytest.raises(LeaseLost):
            calls[what]()
        attempt = self.attempts[shard.id, claim.attempt_no]
        if what == "commit" and attempt.state is AttemptState.LOST:
            attempt.state = AttemptState.SUPERSEDED
            self.note(job, "attempt.superseded", shard, claim.attempt_no)

    # Time, and those who look after what it does.

    @precondition(busy)
    @rule(pick=st.integers(0, 9))
    def a_lease_runs_out(self, pick: int) -> None:
        self.agreed = False
        self.lapse(self.shard(self.attempt(pick)))

    def lapse(self, shard: ShardModel) -> None:
        with self.database.write() as connection:
            connection.execute(tables.shard.update().where(tables.shard.c.id == shard.id).values(lease_until=1.0))
        shard.lapsed = True

    @precondition(busy)
    @rule(pick=st.integers(0, 9), same_owner=st.booleans(), lapsed=st.booleans())
    def an_attempt_is_overtaken(self, pick: int, same_owner: bool, lapsed: bool) -> None:
        """Its lease runs out, the reaper takes its shard, and another attempt gets it, if it is the next."""
        self.agreed = False
        claim = self.attempt(pick)
        self.lapse(self.shard(claim))
        self.reap(200)
        mine = [shard for shard in self.claimable() if shard.id in self.jobs[claim.job.id].shards]
        if mine:
            owner = claim.owner if same_owner else next(owner for owner in OWNERS if owner != claim.owner)
            self.take(owner, -1.0 if lapsed else LEASE, claim.job.id, mine[0])

    @precondition(lambda self: any(shard.waiting for _, shard in self.shards()))
    @rule()
    def every_backoff_passes(self) -> None:
        self.agreed = False
        with self.database.write() as connection:
            table = tables.shard
            connection.execute(table.update().where(table.c.run_after > 1.0).values(run_after=1.0))
        for _, shard in self.shards():
            shard.waiting, shard.run_after = False, min(shard.run_after, 1.0)

    @precondition(lambda self: self.held())
    @rule(batch=st.sampled_from([1, 200]))
    def reap(self, batch: int) -> None:
        self.agreed = False
        found = reaper.reap(self.database, lease_seconds=0.0, max_losses=MAX_LOSSES, actor="reaper", batch=batch)
        assert found == self.all_lost(lambda shard: shard.lapsed)

    @precondition(lambda self: self.held() or any(job.finalizer for job in self.jobs.values()))
    @rule(owner=st.sampled_from(OWNERS))
    def a_worker_is_found_dead(self, owner: str) -> None:
        self.agreed = False
        found = reaper.reap_owners(self.database, [owner], max_losses=MAX_LOSSES, actor="reaper")
        for job in sorted(self.jobs.values(), key=lambda job: job.id):
            if job.finalizer in (owner, f"{owner}#1"):
                self.lose_finalizer(job)
        assert found == self.all_lost(lambda shard: shard.owner == owner)
        self.unregister(owner)

    @rule(owner=st.sampled_from(OWNERS))
    def a_worker_ends(self, owner: str) -> None:
        """Though it could not report how its attempts ended."""
        self.agreed = False
        self.unregister(owner)
        held = {shard.owner for _, shard in self.shards() if shard.owner is not None}
        assert workers.unknown_owners(self.database) == sorted(held - self.registered)

    def unregister(self, owner: str) -> None:
        workers.unregister(self.database, owner)
        self.registered.discard(owner)
        for job in self.jobs.values():
            if job.finalizer in (owner, f"{owner}#1"):
                self.let_go(job)

    def register(self, owner: str) -> None:
        if owner not in self.registered:
            workers.register(self.database, Worker(owner, "host", 1, 1.0, lease_seconds=LEASE))
            self.registered.add(owner)

    @precondition(lambda self: self.jobs)
    @rule(pick=st.integers(0, 9))
    def who_works_on_a_job_is_known(self, pick: int) -> None:
        """Only those who live, as far as anybody can know."""
        self.agreed = False
        job = _pick(list(self.jobs.values()), pick)
        owners = {shard.owner for shard in job.shards.values() if shard.owner and not shard.lapsed}
        if job.finalizer is not None and job.finalizer_lives:
            owners.add(job.finalizer.partition("#")[0])
        found = {holder.worker.id for holder in workers.holders(self.database, job.id)}
        assert found == owners & self.registered

    # The database's clock.

    @rule(seconds=st.sampled_from([2 * LEASE, 400 * LEASE]))
    def the_clock_is_set_back(self, seconds: float) -> None:
        self.agreed = False
        self.shift(seconds)

    def shift(self, seconds: float) -> None:
        """Every stored time lies so much further ahead of the clock: the clock itself is not the test's to set."""
        with self.database.write() as connection:
            for column in TIMES:
                connection.execute(column.table.update().values({column.name: column + seconds}))
        self.read_clock()

    @rule()
    def times_are_brought_back(self) -> None:
        self.agreed = False
        self.bring_back()

    def bring_back(self) -> None:
        clock_steps.bring_back(self.database, lease_seconds=LEASE, retention_seconds=LEASE)
        self.read_clock()
        with self.database.read() as connection:
            for column, most in TIMES.items():
                furthest = connection.execute(sa.select(sa.func.max(column) - now()).where(WAITED_FOR[column])).scalar()
                assert furthest is None or furthest <= most, f"{column} lies {furthest} seconds ahead"

    def read_clock(self) -> None:
        """What has run out, and what is due, is the database's clock's business."""
        shard, job = tables.shard, tables.job
        with self.database.read() as connection:
            clock = connection.execute(sa.select(now())).scalar_one()
            stored = {row.id: row for row in connection.execute(sa.select(shard))}
            until = dict(connection.execute(sa.select(job.c.id, job.c.finalize_until)).all())
        for _, item in self.shards():
            item.run_after = stored[item.id].run_after
            item.waiting = item.run_after > clock
            item.lapsed = item.state is ShardState.RUNNING and stored[item.id].lease_until < clock
        for owner in self.jobs.values():
            owner.finalizer_lives = (until[owner.id] or 0.0) >= clock

    def lose_finalizer(self, job: JobModel) -> None:
        job.finalizer, job.finalizer_lives = None, False
        job.n_lost += 1
        self.note(job, "plan.lost" if job.state is JobState.VALIDATING else "finalize.lost")
        if job.n_lost < MAX_LOSSES or job.n_open:
            return
        job.n_lost, job.epoch = 0, job.epoch + 1
        if job.state not in TERMINAL_JOB:
            stopped = job.stop_reason if job.state is JobState.CANCELLING else None
            ends = {"cancelled": JobState.CANCELLED, "expired": JobState.EXPIRED}
            self.move_job(job, ends.get(stopped or "", JobState.FAILED))

    def all_lost(self, which: Callable[[ShardModel], bool]) -> reaper.Reaped:
        gone = [(job, shard) for job, shard in self.shards() if shard.state is ShardState.RUNNING and which(shard)]
        for job, shard in sorted(gone, key=lambda item: item[1].id):
            self.lose(job, shard)
        self.read_clock()
        dead = sum(shard.state is ShardState.FAILED for _, shard in gone)
        return reaper.Reaped(len(gone) - dead, dead)

    # Publishing.

    def closed_jobs(self) -> list[JobModel]:
        stopped = [job for job in self.in_state(JobState.CANCELLING) if job.n_open == 0]
        return [*self.in_state(JobState.FINALIZING), *stopped]

    def publishable(self) -> list[JobModel]:
        """What may be published, in order."""
        return self.by_turn(job for job in self.closed_jobs() if not job.finalizer_lives)

    @precondition(lambda self: self.in_state(JobState.FINALIZING, JobState.CANCELLING))
    @rule(owner=st.sampled_from(OWNERS), lapsed=st.sampled_from([True, True, False]))
    def claim_finalize(self, owner: str, lapsed: bool) -> None:
        self.agreed = False
        self.take_finalize(owner, -1.0 if lapsed else LEASE, next(iter(self.publishable()), None))

    @precondition(lambda self: self.closed_jobs())
    @rule(owner=st.sampled_from(OWNERS), pick=st.integers(0, 9))
    def claim_finalize_of_one(self, owner: str, pick: int) -> None:
        """What the same command does: it does not wait for a job's turn to come again."""
        self.agreed = False
        job = _pick(self.closed_jobs(), pick)
        free = job.finalizer is None or not job.finalizer_lives
        self.take_finalize(owner, LEASE, job if free else None, job.id)

    def take_finalize(self, owner: str, lease: float, job: JobModel | None, job_id: str | None = None) -> Job | None:
        self.register(owner)
        found = publish_leases.claim_finalize(self.database, owner=owner, lease_seconds=lease, job_id=job_id)
        assert (found and found.id) == (job and job.id)
        if job is not None and found is not None:
            job.epoch, job.finalizer, job.finalizer_lives = job.epoch + 1, owner, lease > 0
            self.note(job, "finalize.claimed")
            self.finalizers.append(found)
        return found

    @precondition(lambda self: self.publishable())
    @rule(owner=st.sampled_from(OWNERS))
    def publish(self, owner: str) -> None:
        """A finalizer that nothing happens to."""
        self.agreed = False
        claimed = self.take_finalize(owner, LEASE, self.publishable()[0])
        assert claimed is not None
        self.complete_one(claimed)

    def is_finalizer(self, claimed: Job) -> bool:
        job = self.jobs[claimed.id]
        return job.epoch == claimed.finalize_epoch and job.state is claimed.state

    def complete_one(self, claimed: Job) -> None:
        job = self.jobs[claimed.id]
        target = publish_leases.end_state(claimed)
        if not self.is_finalizer(claimed):
            with pytest.raises(LeaseLost):
                publish_leases.complete(self.database, claimed, target, actor="finalizer")
            return
        publish_leases.complete(self.database, claimed, target, actor="finalizer")
        if job.state is JobState.CANCELLING and job.stop_reason in ("cancelled", "expired") and job.whole:
            assert target is JobState.COMPLETED
            job.stop_reason = None
        elif job.state is JobState.CANCELLING:
            stopped = {"cancelled": JobState.CANCELLED, "expired": JobState.EXPIRED}
            assert target is stopped.get(job.stop_reason or "", JobState.FAILED)
        else:
            assert target is (JobState.FAILED if job.n_failed_shards else JobState.COMPLETED)
        self.let_go(job)
        self.move_job(job, target)

    @precondition(lambda self: self.finalizers)
    @rule(pick=st.integers(0, 9), what=st.sampled_from(["complete", "complete", "publish", "renew", "fail", "fail"]))
    def a_finalizer_goes_on(self, pick: int, what: str) -> None:
        """Whether or not it is still the one."""
        self.agreed = False
        claimed = _pick(self.finalizers[::-1], pick)
        job = self.jobs[claimed.id]
        if what == "complete":
            self.complete_one(claimed)
            return

        def call() -> None:
            if what == "fail":
                publish_leases.give_back(self.database, claimed, delay=POSTPONED, error="no space", actor="finalizer")
            elif what == "publish":
                publish_leases.begin_publishing(self.database, claimed, actor="finalizer")
            else:
                publish_leases.renew(self.database, claimed, lease_seconds=LEASE)

        if not self.is_finalizer(claimed):
            with pytest.raises(LeaseLost):
                call()
            return
        call()
        if what == "publish":
            job.publishing = True
            self.note(job, "finalize.publishing")
        elif what == "fail":
            job.finalizer, job.finalizer_lives = None, True
            self.note(job, "finalize.failed")
        else:
            job.finalizer_lives = True

    @precondition(lambda self: any(job.finalizer_lives for job in self.jobs.values()))
    @rule(pick=st.integers(0, 9))
    def a_finalizers_lease_runs_out(self, pick: int) -> None:
        self.agreed = False
        job = _pick([job for job in self.jobs.values() if job.finalizer_lives], pick)
        with self.database.write() as connection:
            connection.execute(tables.job.update().where(tables.job.c.id == job.id).values(finalize_until=1.0))
        job.finalizer_lives = False

    # What must be true after every call.

    @invariant()
    def both_agree(self) -> None:
        stored = _read(self.database, self.first_event)
        self.holds_by_itself(stored)
        assert stored.jobs == {
            job.id: (
                job.state, job.gen, job.stop_reason, job.n_open, job.n_failed_shards, job.rows_done,
                job.rows_failed, job.tokens, job.epoch, job.finalizer, job.finalizer_lives, job.publishing,
            )
            for job in self.jobs.values()
        }  # fmt: skip
        assert stored.shards == {
            shard.id: (
                shard.state, shard.attempt_no, shard.owner, shard.committed, shard.done, shard.failed, shard.select,
                len(shard.done), len(shard.failed), shard.n_fail, shard.n_lost, shard.tokens, shard.lapsed,
            )
            for _, shard in self.shards()
        }  # fmt: skip
        assert stored.attempts == {
            key: (item.owner, item.state, item.resumed, item.computed) for key, item in self.attempts.items()
        }
        assert stored.parts == self.parts
        assert stored.used == (
            sum(row_n for job in self.jobs.values() for row_n in job.counted_rows),
            sum(shard.tokens for _, shard in self.shards() if shard.state is ShardState.COMMITTED),
        )
        assert stored.exceptions == self.exceptions
        assert stored.events == self.events, (stored.events[-4:], self.events[-4:])
        self.agreed = True

    def holds_by_itself(self, stored: _Stored) -> None:
        """What durability promises, read from the database alone."""
        running = Counter(shard for (shard, _), (_, state, *_) in stored.attempts.items() if state == "running")
        newest: dict[str, int] = {}
        for shard, number in stored.attempts:
            newest[shard] = max(newest.get(shard, 0), number)
        for name, (state, attempt_no, owner, committed, done, failed, select, *_) in stored.shards.items():
            assert attempt_no >= self.seen.get(name, 0), "the fence went down"
            assert attempt_no == newest.get(name, 0), "an attempt without its fence"
            self.seen[name] = attempt_no
            assert running[name] == (state == "running")
            assert (owner is not None) == (state == "running")
            flushed = [rows for (shard, _, seq), (rows, _) in stored.parts.items() if shard == name and seq >= 0]
            assert sum(map(len, flushed)) == len(done), "a row was flushed twice"
            assert set().union(*flushed) == done
            assert failed <= done
            outputs = [key[1] for key in stored.parts if key[0] == name and key[2] == OUTPUT_SEQ]
            assert outputs == ([committed] if committed is not None else [])
            assert (committed is not None) == (state == "committed")
            assert select is None or done <= select
            if committed is not None:
                assert stored.attempts[name, committed][1] == "succeeded"
        for name, (state, _, _, n_open, *_) in stored.jobs.items():
            mine = [values[0] for shard, values in stored.shards.items() if shard.startswith(f"{name}.")]
            assert n_open == sum(shard in OPEN_SHARD for shard in mine)
            if state in TERMINAL_JOB or state is JobState.FINALIZING:
                assert n_open == 0, "a job ended with open shards"
            last = [kind for job, _, _, kind in stored.events if job == name and kind.startswith("job.")][-1]
            assert last == f"job.{state}", "a change of state without its event"

    # Liveness.

    def teardown(self) -> None:
        """The faults are over: every job ends, and whatever did not complete does so when it is retried."""
        if not self.agreed:
            return  # the history has failed already: say that, and not what follows from it
        self.settled = {
            (job.id, shard.idx): set(range(shard.row_n)) - shard.wanted | shard.done - shard.failed
            for job in self.jobs.values()
            if job.reopening is not False  # a retry of all rows still waits for its plan: every row is asked for again
            for shard in job.newest
        }
        self.one_lease_passes()
        self.tick("ada")
        assert all(job.state in TERMINAL_JOB for job in self.jobs.values()), "a job is stuck"
        for job in self.jobs.values():
            if not self.is_overtaken(job) and (job.state is not JobState.COMPLETED or job.n_failed_shards):
                self.retry_one(job, failed_only=True, plan_again=job.gen % 2 == 1)
                self.tick("bob")
                assert job.state is JobState.COMPLETED, "a retry did not complete it"
        self.both_agree()

    def one_lease_passes(self) -> None:
        """At once, for the test: every stored time comes so much nearer."""
        self.bring_back()
        self.shift(-LEASE - 1.0)

    def tick(self, owner: str) -> None:
        """What happens within one tick: the calls of the round, and of the workers that it wakes."""
        self.bring_back()
        found = reaper.reap(self.database, lease_seconds=0.0, max_losses=MAX_LOSSES, actor="reaper")
        assert found == self.all_lost(lambda shard: shard.lapsed)
        for job in self.in_state(JobState.VALIDATING):
            self.plan_one(job, [2])
        self.run(owner, 0, True)
        self.calm_down()

    def calm_down(self) -> None:
        """What is being wound down ends, and all that has ended is published."""
        for job in self.in_state(JobState.CANCELLING):
            assert jobs.cancel_ready(self.database, job.id, actor="client") == self.cancel_all_ready(job)
        while self.publishable():
            self.publish("ada")


@dataclass
class _Stored:
    jobs: dict[str, tuple[Any, ...]]
    shards: dict[str, tuple[Any, ...]]
    attempts: dict[tuple[str, int], tuple[Any, ...]]
    parts: dict[tuple[str, int, int], tuple[set[int], set[int]]]
    exceptions: dict[tuple[str, int], str]
    events: list[Event]
    used: tuple[int, int]
    """Rows and tokens that the tenant was counted."""


def _read(database: Database, first_event: int) -> _Stored:
    t = tables
    with database.read() as connection:
        clock = connection.execute(sa.select(now())).scalar_one()
        every = {
            table.name: connection.execute(sa.select(table)).all()
            for table in (t.job, t.shard, t.attempt, t.part_file, t.row_exception, t.tenant_usage)
        }
        events = connection.execute(sa.select(t.event).where(t.event.c.id > first_event).order_by(t.event.c.id)).all()
    return _Stored(
        jobs={
            row.id: (
                JobState(row.state),
                row.gen,
                row.stop_reason,
                row.n_open,
                row.n_failed_shards,
                row.rows_done,
                row.rows_failed,
                row.prompt_tokens,
                row.finalize_epoch,
                row.finalize_owner,
                row.finalize_until is not None and row.finalize_until >= clock,
                row.publishing,
            )
            for row in every["job"]
        },
        shards={
            row.id: (
                ShardState(row.state),
                row.attempt_no,
                row.lease_owner,
                row.committed_attempt,
                set(row.done),
                set(row.failed),
                None if row.select is None else frozenset(row.select),
                row.n_done,
                row.n_failed,
                row.n_fail,
                row.n_lost,
                row.prompt_tokens,
                row.lease_until is not None and row.lease_until < clock,
            )
            for row in every["shard"]
        },
        attempts={
            (row.shard_id, row.attempt_no): (row.worker_id, row.state, row.rows_resumed, row.rows_computed)
            for row in every["attempt"]
        },
        parts={(row.shard_id, row.attempt_no, row.seq): (set(row.rows), set(row.failed)) for row in every["part_file"]},
        exceptions={(row.shard_id, row.row_idx): row.code for row in every["row_exception"]},
        used=(sum(row.rows for row in every["tenant_usage"]), sum(row.tokens for row in every["tenant_usage"])),
        events=[(row.job_id, row.shard_id, row.attempt_no, row.type) for row in events],
    )


def _pick(items: list[Any], number: int) -> Any:
    return items[number % len(items)]


def _uri(shard: str, attempt_no: int, seq: int) -> str:
    return f"/{shard}/{attempt_no}/{seq}"


def _part(claim: Claim, seq: int, rows: Any, failed: Any) -> PartFile:
    uri = _uri(claim.shard.id, claim.attempt_no, seq)
    return PartFile(claim.attempt_no, seq, uri, 1, "sha", "etag", BitMap(rows), BitMap(failed))


@pytest.mark.timeout(3600)
@pytest.mark.hypothesis
def test_the_storage_layer_does_what_the_model_does(database_url: str) -> None:
    database = Database(database_url)
    try:
        run_state_machine_as_test(lambda: StorageMachine(database), settings=PROFILES[PROFILE])
    finally:
        database.close()
