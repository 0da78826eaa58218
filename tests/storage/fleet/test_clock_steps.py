"""Stored times after the database's clock was set back: nothing waits for them. On SQLite and PostgreSQL."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from storage.fleet import clock_steps, garbage, workers
from storage.fleet.workers import Worker
from storage.queue import attempts, claims, plan_leases, publish_leases, reaper
from storage.queue.claims import Lease
from storage.queue.jobs import get
from storage.records import LONGEST_BACKOFF_SECONDS
from storage.sql import tables
from storage.sql.database import Database, now
from storage.states import JobState
from tests.storage.jobs_in_sql import LEASE, OWNER, planned_job, stored, take, unplanned_job

HOUR = 3600.0
WORKER = Worker(OWNER, "host", 1, 1.5, lease_seconds=LEASE)


def set_back(database: Database, seconds: float = HOUR) -> None:
    """As if the clock had shown ``seconds`` more until now."""
    t = tables
    with database.write() as connection:
        for column in (
            t.shard.c.run_after,
            t.shard.c.lease_until,
            t.job.c.finalize_until,
            t.worker.c.heartbeat_at,
            t.gc_queue.c.not_before,
        ):
            connection.execute(column.table.update().values({column.name: column + seconds}))


def bring_back(database: Database, lease: float = LEASE) -> int:
    return clock_steps.bring_back(database, lease_seconds=lease, retention_seconds=HOUR)


def ahead(database: Database, column: sa.Column[Any]) -> float:
    """How far ahead of the clock the one time in this column lies."""
    with database.read() as connection:
        return float(connection.execute(sa.select(column - now())).scalar_one())


def test_a_shard_that_waits_for_a_wrong_time_is_due(database: Database) -> None:
    job = planned_job(database, shards=2)
    set_back(database)
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE) is None
    assert bring_back(database) == 2
    assert take(database, job).attempt_no == 1
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE) is not None


def test_a_backoff_is_left_alone(database: Database) -> None:
    job = planned_job(database, shards=1)
    attempts.fail(database, take(database, job), "oh", delay=LONGEST_BACKOFF_SECONDS, max_failures=9)
    assert bring_back(database) == 0
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE) is None


def test_a_lease_counts_from_now(database: Database) -> None:
    """A live attempt renews it and loses nothing; a dead one loses it one lease later."""
    job = planned_job(database, shards=1)
    claim = take(database, job)
    set_back(database)
    assert bring_back(database) == 2, "its lease, and when it may run again"
    assert LEASE - 30 < ahead(database, tables.shard.c.lease_until) <= LEASE
    assert reaper.reap(database, lease_seconds=0.0, max_losses=8, actor="test") == reaper.Reaped(0, 0)
    held = [(claim.shard.id, claim.attempt_no)]
    assert set(claims.heartbeat(database, held, owner=OWNER, lease_seconds=LEASE).values()) == {Lease.HELD}


def test_a_lease_is_as_long_as_that_of_any_worker(database: Database) -> None:
    workers.register(database, Worker(OWNER, "host", 1, 1.5, lease_seconds=10 * LEASE))
    take(database, planned_job(database, shards=1), lease=10 * LEASE)
    assert bring_back(database) == 0


def test_a_publishing_lease_counts_from_now(database: Database) -> None:
    job = planned_job(database, shards=0)
    workers.register(database, WORKER)
    publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE)
    set_back(database)
    bring_back(database)
    assert LEASE - 30 < ahead(database, tables.job.c.finalize_until) <= LEASE
    [holder] = workers.holders(database, job.id)
    assert (holder.worker.id, holder.seconds <= LEASE) == (OWNER, True)


def test_a_job_that_waits_to_be_published_or_planned_again_is_due(database: Database) -> None:
    job = planned_job(database, shards=0)
    claimed = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE)
    assert claimed is not None
    publish_leases.give_back(database, claimed, delay=LEASE, error="no space", actor=OWNER)
    waiting = unplanned_job(database)
    plan_leases.postpone(database, waiting.id, owner=OWNER, error="no answer", delay=LEASE)
    set_back(database)
    assert publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE) is None
    assert plan_leases.claim(database, owner=OWNER, lease_seconds=LEASE) is None
    assert bring_back(database) == 2
    again = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE)
    assert again is not None
    assert again.id == job.id
    planned = plan_leases.claim(database, owner=OWNER, lease_seconds=LEASE)
    assert planned is not None
    assert planned.id == waiting.id


def test_a_dead_worker_does_not_seem_alive(database: Database) -> None:
    workers.register(database, WORKER)
    set_back(database)
    bring_back(database)
    with database.write() as connection:
        connection.execute(tables.worker.update().values(heartbeat_at=tables.worker.c.heartbeat_at - LEASE))
    assert not workers.any_alive(database, within=LEASE)


def test_garbage_waits_no_longer_than_it_is_kept(database: Database) -> None:
    job = planned_job(database, shards=0)
    garbage.enqueue(database, job.id, "/out/work", delay=HOUR)
    year = 365 * 24 * HOUR
    set_back(database, year)
    assert bring_back(database) == 1
    assert ahead(database, tables.gc_queue.c.not_before) <= garbage.LONGEST_DELAY_SECONDS


def test_nothing_is_written_where_the_clock_was_right(database: Database) -> None:
    job = planned_job(database, shards=2)
    take(database, job)
    workers.register(database, WORKER)
    garbage.enqueue(database, job.id, "/out/work", delay=HOUR)
    before = [stored(database, name) for name in ("shard", "job", "worker", "gc_queue")]
    assert bring_back(database) == 0
    assert [stored(database, name) for name in ("shard", "job", "worker", "gc_queue")] == before


@pytest.mark.parametrize("known", [True, False])
def test_only_a_registered_worker_with_a_lease_holds_a_job(database: Database, known: bool) -> None:
    job = planned_job(database, shards=1)
    if known:
        workers.register(database, WORKER)
    claim = take(database, job)
    assert [holder.worker.id for holder in workers.holders(database, job.id)] == ([OWNER] if known else [])
    assert workers.unknown_owners(database) == ([] if known else [OWNER])
    with database.write() as connection:
        connection.execute(tables.shard.update().where(tables.shard.c.id == claim.shard.id).values(lease_until=1.0))
    assert workers.holders(database, job.id) == []


def test_who_ends_lets_go_of_what_it_plans_and_publishes(database: Database) -> None:
    workers.register(database, WORKER)
    publishing, planning = planned_job(database, shards=0), unplanned_job(database)
    publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE)
    plan_leases.claim(database, owner=f"{OWNER}#1", lease_seconds=LEASE)
    assert [len(workers.holders(database, job.id)) for job in (publishing, planning)] == [1, 1]
    workers.unregister(database, OWNER)
    assert {row.finalize_owner for row in stored(database, "job")} == {None}
    assert publish_leases.claim_finalize(database, owner="other", lease_seconds=LEASE) is not None
    assert plan_leases.claim(database, owner="other", lease_seconds=LEASE) is not None


def test_a_job_that_cannot_be_published_holds_up_no_other(database: Database) -> None:
    first, second = planned_job(database, shards=0), planned_job(database, shards=0)
    for job in (first, second):
        claimed = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE)
        assert claimed is not None
        assert claimed.id == job.id
        assert publish_leases.last_failure(database, job.id) is None
        publish_leases.give_back(database, claimed, delay=LEASE, error="read-only", actor=OWNER)
        assert publish_leases.last_failure(database, job.id) == "read-only"
    assert publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE) is None
    asked_for = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE, job_id=second.id)
    assert asked_for is not None
    assert get(database, second.id).state is JobState.FINALIZING


def test_an_ended_job_is_published_once_more_though_a_finalizer_died_at_it(database: Database) -> None:
    job = planned_job(database, shards=0)
    first = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE)
    assert first is not None
    publish_leases.begin_publishing(database, first, actor=OWNER)
    publish_leases.complete(database, first, JobState.COMPLETED, actor=OWNER)
    publish_leases.request_republish(database, job.output_uri, actor="late")
    for lease in (-1.0, LEASE):  # the first of them dies
        again = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=lease)
        assert again is not None
        publish_leases.begin_publishing(database, again, actor=OWNER)
    publish_leases.request_republish(database, job.output_uri, actor="late")
    assert publish_leases.complete(database, again, JobState.COMPLETED, actor=OWNER) is None, "touched meanwhile"
    publish_leases.begin_publishing(database, again, actor=OWNER)
    assert publish_leases.complete(database, again, JobState.COMPLETED, actor=OWNER) is not None
    assert publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE) is None
