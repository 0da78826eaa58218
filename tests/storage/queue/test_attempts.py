"""Claim, heartbeat, flush, commit, fail, release, cancel: each fenced, each one transaction, on every database."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from pyroaring import BitMap

from pipeline.process.heartbeat import JOB_STOPPING, LeaseKeeper
from storage.errors import LeaseLost
from storage.queue import attempts as shards
from storage.queue import claims, job_progress, jobs, reaper
from storage.queue.claims import Lease
from storage.records import RowException
from storage.sql.database import Database
from storage.states import AttemptState, JobState, ShardState
from tests.storage.jobs_in_sql import LEASE, OWNER, expire_lease, output, part, planned_job, stored, take


def reap(database: Database, max_losses: int = 8) -> reaper.Reaped:
    # lease_seconds=0: the rule that spares everybody just after the database's start is tested on its own.
    return reaper.reap(database, lease_seconds=0.0, max_losses=max_losses, actor="reaper")


def test_a_claim_raises_the_fence_and_starts_the_job(database: Database) -> None:
    job = planned_job(database)
    claim = take(database, job)
    assert (claim.attempt_no, claim.shard.idx, claim.shard.state) == (1, 0, ShardState.RUNNING)
    assert claim.todo == BitMap(range(10))
    assert claim.sources[0].uri == "/in.parquet"
    assert jobs.get(database, job.id).state is JobState.IN_PROGRESS
    [attempt] = stored(database, "attempt", shard_id=claim.shard.id)
    assert (attempt.worker_id, attempt.state) == (OWNER, AttemptState.RUNNING)


def test_claims_go_by_priority_then_row_order(database: Database) -> None:
    low = planned_job(database, shards=2)
    high = planned_job(database, shards=1, priority=5)
    found = [claims.claim(database, owner=OWNER, lease_seconds=LEASE, queues=["fake"]) for _ in range(4)]
    assert [(c.job.id, c.shard.idx) for c in found if c] == [(high.id, 0), (low.id, 0), (low.id, 1)]
    assert found[3] is None


def test_another_queue_is_not_served(database: Database) -> None:
    planned_job(database)
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE, queues=["vllm"]) is None


def test_concurrent_claimers_never_share_a_shard(database: Database) -> None:
    job = planned_job(database, shards=40)
    found: list[str] = []
    lock = threading.Lock()
    start = threading.Barrier(4)

    def work(owner: str) -> None:
        start.wait()
        while (claim := claims.claim(database, owner=owner, lease_seconds=LEASE, job_id=job.id)) is not None:
            with lock:
                found.append(claim.shard.id)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # PostgreSQL's SKIP LOCKED may let a claimer find nothing while another holds the last rows, so some may be left.
    while (claim := claims.claim(database, owner="last", lease_seconds=LEASE, job_id=job.id)) is not None:
        found.append(claim.shard.id)
    assert len(found) == len(set(found)) == 40


def test_counting_failed_rows_reads_the_shards_that_have_some(database: Database) -> None:
    job = planned_job(database, shards=1500, rows=2, max_failed_rows=1)
    claim, done = take(database, job), take(database, job)
    for held in (claim, done):
        shards.flush(database, held, part(held, [0], failed=(0,)), tokens={})
    shards.commit(database, done, output(done), stats={})
    with database.write() as connection:
        connection.execute(sa.text("ANALYZE"))
    steps: list[int] = []
    with database.write() as connection:
        raw: Any = connection.connection.driver_connection
        if database.sqlite:
            raw.set_progress_handler(lambda: steps.append(1), 1)
        found = job_progress.failed_so_far(connection, job.id)
        if database.sqlite:
            raw.set_progress_handler(None, 0)
            read = len(steps) // 10
        else:
            query = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'shard'"
            read = connection.execute(sa.text(query)).scalar_one()
    assert (found.failed, found.state) == (2, JobState.IN_PROGRESS)
    assert read < 50
    assert job_progress.stop_if_too_many_failed(database, job.id, "test")
    assert not job_progress.stop_if_too_many_failed(database, job.id, "test")
    assert jobs.get(database, job.id).state is JobState.CANCELLING


def test_a_heartbeat_tells_held_from_lost_from_stopping(database: Database) -> None:
    job, other = planned_job(database), planned_job(database)
    mine, lost, stopping = take(database, job), take(database, job), take(database, other)
    expire_lease(database, lost)
    assert reap(database).ready == 1
    jobs.request_stop(database, other.id, "cancelled", actor="test")
    held = [(c.shard.id, c.attempt_no) for c in (mine, lost, stopping)]
    found = claims.heartbeat(database, held, owner=OWNER, lease_seconds=LEASE)
    assert [found[key] for key in held] == [Lease.HELD, Lease.LOST, Lease.STOPPING]


def test_a_cancel_is_seen_between_heartbeats(database: Database) -> None:
    one, two = planned_job(database, shards=1), planned_job(database, shards=1)
    keeper = LeaseKeeper(database, worker_id=OWNER, lease_seconds=LEASE, watch_seconds=0.01)
    held = [keeper.register(take(database, job)) for job in (one, two)]
    jobs.request_stop(database, two.id, "cancelled", actor="test")
    keeper.poll_cancellation()
    assert [cancel.reason for cancel in held] == [None, JOB_STOPPING]
    assert claims.stopping(database, {one.id, two.id, "nobody"}) == {two.id}


def test_a_flush_is_a_resume_point(database: Database) -> None:
    job = planned_job(database, shards=1)
    claim = take(database, job)
    tokens = {"prompt_tokens": 7, "completion_tokens": 3}
    shards.flush(
        database,
        claim,
        part(claim, [0, 1, 5], failed=(5,)),
        tokens=tokens,
        exceptions=[RowException(5, "missing_value", "no text")],
    )
    shards.release(database, claim)
    again = take(database, job)
    assert again.attempt_no == 2
    assert again.todo == BitMap([2, 3, 4, 6, 7, 8, 9])
    assert [item.rows for item in again.parts] == [BitMap([0, 1, 5])]
    assert again.shard.failed == BitMap([5])
    shards.flush(database, again, part(again, [2, 3, 4, 6, 7, 8, 9]), tokens=tokens)
    assert shards.commit(database, again, output(again, (5,)), stats={}) is JobState.FINALIZING
    done = jobs.get(database, job.id)
    assert (done.rows_done, done.rows_failed) == (10, 1)
    assert done.tokens == {"prompt_tokens": 14, "cached_tokens": 0, "completion_tokens": 6}
    attempts = stored(database, "attempt")
    assert [(a.state, a.rows_resumed, a.rows_computed) for a in attempts] == [("released", 0, 3), ("succeeded", 3, 7)]


def test_only_the_first_hundred_failures_are_kept_in_sql(database: Database) -> None:
    job = planned_job(database, shards=1, rows=300)
    claim = take(database, job)
    for seq, low in enumerate((0, 150)):
        rows = list(range(low, low + 150))
        failures = [RowException(row, "missing_value", "no text") for row in rows]
        shards.flush(database, claim, part(claim, rows, seq=seq, failed=tuple(rows)), tokens={}, exceptions=failures)
    assert len(stored(database, "row_exception")) == 100
    assert stored(database, "shard")[0].n_failed == 300


def test_the_last_commit_finalizes_the_job_once(database: Database) -> None:
    job = planned_job(database, shards=8)
    held = [take(database, job) for _ in range(8)]
    results: list[JobState] = []
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait()
        results.append(shards.commit(database, held[index], output(held[index]), stats={}))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted([JobState.IN_PROGRESS] * 7 + [JobState.FINALIZING])
    assert len(stored(database, "event", job_id=job.id, type="job.finalizing")) == 1
    assert jobs.get(database, job.id).n_open == 0


def test_a_zombie_is_fenced_after_the_reaper(database: Database) -> None:
    job = planned_job(database, shards=1)
    zombie = take(database, job)
    expire_lease(database, zombie)
    assert reap(database).ready == 1
    with pytest.raises(LeaseLost):
        shards.flush(database, zombie, part(zombie, [0]), tokens={})
    with pytest.raises(LeaseLost):
        shards.commit(database, zombie, output(zombie), stats={})
    assert stored(database, "part_file") == []
    assert stored(database, "attempt")[0].state == AttemptState.SUPERSEDED
    fresh = take(database, job)
    for write in (
        lambda: shards.fail(database, zombie, "late", delay=0, max_failures=4),
        lambda: shards.release(database, zombie),
        lambda: shards.cancel(database, zombie),
        lambda: shards.fail_job(database, zombie, "late"),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert shards.commit(database, fresh, output(fresh), stats={}) is JobState.FINALIZING
    assert stored(database, "shard")[0].committed_attempt == 2


def test_a_late_attempt_commits_if_nobody_reaped_it(database: Database) -> None:
    job = planned_job(database, shards=1)
    late = take(database, job)
    expire_lease(database, late)
    assert shards.commit(database, late, output(late), stats={}) is JobState.FINALIZING
    assert reap(database) == reaper.Reaped(0, 0)


def test_committing_twice_counts_once(database: Database) -> None:
    job = planned_job(database, shards=1)
    claim = take(database, job)
    shards.flush(database, claim, part(claim, list(range(10))), tokens={"prompt_tokens": 5})
    assert shards.commit(database, claim, output(claim), stats={}) is JobState.FINALIZING
    # The answer to the first COMMIT was lost: the worker asks again.
    assert shards.commit(database, claim, output(claim), stats={}) is JobState.FINALIZING
    done = jobs.get(database, job.id)
    assert (done.n_open, done.rows_done, done.tokens["prompt_tokens"]) == (0, 10, 5)


def test_failures_back_off_and_then_are_given_up(database: Database) -> None:
    job = planned_job(database, shards=1)
    for _ in range(2):
        claim = take(database, job)
        assert shards.fail(database, claim, "no luck", delay=0.0, max_failures=3) is ShardState.READY
    claim = take(database, job)
    assert shards.fail(database, claim, "no luck", delay=0.0, max_failures=3) is ShardState.FAILED
    done = jobs.get(database, job.id)
    assert (done.state, done.n_failed_shards, done.n_open) == (JobState.FINALIZING, 1, 0)


def test_an_engine_that_dies_after_progress_costs_nothing(database: Database) -> None:
    job = planned_job(database, shards=1)
    for seq in range(6):
        claim = take(database, job)
        shards.flush(database, claim, part(claim, [seq]), tokens={})
        assert shards.fail(database, claim, "killed", delay=0.0, max_failures=2, crash=True) is ShardState.READY
    [shard] = stored(database, "shard", job_id=job.id)
    assert (shard.n_fail, shard.n_done) == (0, 6)
    # Without progress it does, and so does another failure, progress or not.
    claim = take(database, job)
    shards.fail(database, claim, "killed", delay=0.0, max_failures=3, crash=True)
    claim = take(database, job)
    shards.flush(database, claim, part(claim, [6]), tokens={})
    shards.fail(database, claim, "no luck", delay=0.0, max_failures=3)
    [shard] = stored(database, "shard", job_id=job.id)
    assert shard.n_fail == 2


def test_a_shard_in_backoff_is_not_claimed(database: Database) -> None:
    job = planned_job(database, shards=1)
    shards.fail(database, take(database, job), "no luck", delay=3600.0, max_failures=3)
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE, job_id=job.id) is None


def test_an_error_that_no_retry_can_help_ends_the_job(database: Database) -> None:
    job = planned_job(database, shards=3)
    claim = take(database, job)
    shards.fail_job(database, claim, "its input changed")
    while jobs.cancel_ready(database, job.id, actor="test"):
        pass
    stopped = jobs.get(database, job.id)
    assert (stopped.state, stopped.stop_reason, stopped.error) == (JobState.CANCELLING, "failed", "its input changed")
    assert stopped.n_open == 0


def test_losses_are_counted_only_without_progress(database: Database) -> None:
    job = planned_job(database, shards=1)
    for seq in range(3):
        claim = take(database, job)
        shards.flush(database, claim, part(claim, [seq]), tokens={})
        expire_lease(database, claim)
        assert reap(database, max_losses=2).ready == 1
    take(database, job)
    expire_lease(database, claim)
    assert reap(database, max_losses=2).ready == 1
    take(database, job)
    expire_lease(database, claim)
    assert reap(database, max_losses=2) == reaper.Reaped(0, 1)
    assert jobs.get(database, job.id).state is JobState.FINALIZING


def test_two_reapers_make_one_transition(database: Database) -> None:
    job = planned_job(database, shards=1)
    expire_lease(database, take(database, job))
    results: list[reaper.Reaped] = []
    start = threading.Barrier(2)

    def work() -> None:
        start.wait()
        results.append(reap(database))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(item.ready for item in results) == 1
    assert len(stored(database, "event", type="shard.ready")) == 1


@pytest.mark.postgres
def test_nobody_is_reaped_within_a_lease_of_the_databases_start(postgres_database: str) -> None:
    database = Database(postgres_database)
    job = planned_job(database, shards=1)
    expire_lease(database, take(database, job))
    century = 100 * 365 * 86400.0
    assert reaper.reap(database, lease_seconds=century, max_losses=8, actor="r") == reaper.Reaped(0, 0)
    database.close()


def test_what_dead_workers_held_is_taken_back_at_once(database: Database) -> None:
    job = planned_job(database, shards=2)
    take(database, job, owner="dead")
    take(database, job, owner="alive")
    assert reaper.reap_owners(database, ["dead"], max_losses=8, actor="test").ready == 1
    assert sorted(row.state for row in stored(database, "shard")) == ["ready", "running"]


def test_too_many_failed_rows_stop_the_job(database: Database) -> None:
    job = planned_job(database, shards=2, max_failed_rows=1)
    claim = take(database, job)
    shards.flush(database, claim, part(claim, [0], failed=(0,)), tokens={})
    assert not job_progress.stop_if_too_many_failed(database, job.id, "test")
    shards.flush(database, claim, part(claim, [1], seq=1, failed=(1,)), tokens={})
    assert job_progress.stop_if_too_many_failed(database, job.id, "test")
    stopped = jobs.get(database, job.id)
    assert (stopped.state, stopped.stop_reason) == (JobState.CANCELLING, "max_failed_rows")
