"""Deleting ended jobs: who may be deleted, what goes, and what other jobs may do afterwards."""

from __future__ import annotations

import pytest

from storage.errors import Conflict, LeaseLost, NotFound
from storage.fleet import garbage, job_lookup
from storage.queue import attempts, claims, deletion, jobs, publish_leases, reopen
from storage.records import Job
from storage.sql import tables
from storage.sql.database import Database
from tests.storage.jobs_in_sql import LEASE, OWNER, output, part, planned_job, stored, take


def _publish(database: Database, job: Job) -> Job:
    claimed = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE, job_id=job.id)
    assert claimed is not None
    publish_leases.begin_publishing(database, claimed, actor="test")
    claimed = jobs.get(database, job.id)
    ended = publish_leases.complete(database, claimed, publish_leases.end_state(claimed), actor="test")
    assert ended is not None
    return ended


def _cancelled(database: Database, job: Job) -> Job:
    jobs.request_stop(database, job.id, "cancelled", actor="test")
    return _publish(database, job)


def test_every_row_of_a_deleted_job_goes_and_no_other(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "_ROWS_AT_ONCE", 3)
    monkeypatch.setattr(deletion, "_SHARDS_AT_ONCE", 2)
    kept, job = planned_job(database), planned_job(database, shards=5, idempotency_key="k")
    claim = take(database, job)
    attempts.flush(database, claim, part(claim, [1, 2], failed=(2,)), tokens={})
    attempts.commit(database, claim, output(claim), stats={})
    with pytest.raises(Conflict, match=r"in_progress.*cancel it first"):
        deletion.mark(database, job.id)
    job = _cancelled(database, job)
    garbage.enqueue(database, job.id, "/out/work", delay=60.0)
    assert deletion.mark(database, job.id).id == job.id
    for look in (jobs.get, job_lookup.find, deletion.mark):
        with pytest.raises(NotFound):
            look(database, job.id)
    with pytest.raises(NotFound):
        reopen.reopen(database, job.id, failed_only=True, window_seconds=60.0, actor="test")
    assert [item.id for item in job_lookup.listed(database)] == [kept.id]
    assert jobs.newest_on_output(database, job.output_uri) is None
    assert not jobs.has_key(database, "default", "k")
    garbage.enqueue(database, job.id, "/out/late", delay=60.0)
    deletion.delete_rows(database, job.id)
    deletion.delete_rows(database, job.id)
    assert [row.id for row in stored(database, "job")] == [kept.id]
    assert {row.job_id for row in stored(database, "shard")} == {kept.id}
    for table in ("event", "source"):
        assert {row.job_id for row in stored(database, table)} == {kept.id}
    for table in ("attempt", "part_file", "row_exception", "gc_queue"):
        assert stored(database, table) == []


def test_who_comes_back_to_a_deleted_job_has_lost_its_lease(database: Database) -> None:
    job = planned_job(database, shards=1)
    claim = take(database, job)
    with database.write() as connection:  # as a reaper and a cancel would, while the worker was frozen
        connection.execute(tables.shard.update().values(state="cancelled", lease_owner=None, lease_until=None))
        connection.execute(tables.job.update().values(state="cancelled", ended_at=1.0, n_open=0))
    deletion.mark(database, job.id)
    deletion.delete_rows(database, job.id)
    for write in (
        lambda: attempts.flush(database, claim, part(claim, [1]), tokens={}),
        lambda: attempts.commit(database, claim, output(claim), stats={}),
        lambda: attempts.fail(database, claim, "late", delay=0.0, max_failures=3),
        lambda: attempts.release(database, claim),
        lambda: attempts.cancel(database, claim),
    ):
        with pytest.raises(LeaseLost):
            write()
    attempts.supersede(database, claim)
    assert claims.heartbeat(database, [(claim.shard.id, 1)], owner=OWNER, lease_seconds=LEASE) == {
        (claim.shard.id, 1): claims.Lease.LOST
    }
    assert stored(database, "event") == []


def test_what_a_deleted_job_published_is_not_replaced_by_an_older_one(database: Database) -> None:
    older = _cancelled(database, planned_job(database, output_uri="/out/shared"))
    unpublished = planned_job(database, output_uri="/out/shared")
    jobs.request_stop(database, unpublished.id, "cancelled", actor="test")
    claimed = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE, job_id=unpublished.id)
    assert claimed is not None
    publish_leases.complete(database, claimed, publish_leases.end_state(claimed), actor="test")
    newer = _cancelled(database, planned_job(database, output_uri="/out/shared"))
    deletion.mark(database, newer.id)
    deletion.delete_rows(database, newer.id)
    for job in (older, unpublished):
        with pytest.raises(Conflict, match="belongs to"):
            reopen.reopen(database, job.id, failed_only=True, window_seconds=60.0, actor="test")
    publish_leases.request_republish(database, "/out/shared", actor="test")
    assert publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE) is None
    # Whoever published nothing leaves the output to those before it.
    first = _cancelled(database, planned_job(database, output_uri="/out/other"))
    second = planned_job(database, output_uri="/out/other")
    jobs.request_stop(database, second.id, "cancelled", actor="test")
    claimed = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE, job_id=second.id)
    assert claimed is not None
    publish_leases.complete(database, claimed, publish_leases.end_state(claimed), actor="test")
    deletion.mark(database, second.id)
    deletion.delete_rows(database, second.id)
    assert reopen.reopen(database, first.id, failed_only=True, window_seconds=60.0, actor="test").gen == 1


def test_a_job_that_is_published_once_more_is_not_deleted(database: Database) -> None:
    job = _cancelled(database, planned_job(database))
    publish_leases.request_republish(database, job.output_uri, actor="test")
    with pytest.raises(Conflict, match="published once more"):
        deletion.mark(database, job.id)
    assert deletion.due(database, older_than=-1.0, limit=9) == []
    assert publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE) is not None
    with pytest.raises(Conflict, match="published once more"):
        deletion.mark(database, job.id)


def test_old_jobs_are_due_and_unfinished_deletions_come_back(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, old, young = (planned_job(database) for _ in range(3))
    for job in (old, young):
        _cancelled(database, job)
    with database.write() as connection:
        connection.execute(tables.job.update().where(tables.job.c.id == old.id).values(ended_at=1000.0))
    assert deletion.due(database, older_than=3600.0, limit=9) == [old.id]
    assert deletion.due(database, older_than=-1.0, limit=9) == [old.id, young.id]
    deletion.mark(database, old.id)
    assert deletion.due(database, older_than=3600.0, limit=9) == []
    assert deletion.unfinished(database, limit=9) == []  # whoever marked it is at it
    monkeypatch.setattr(deletion, "LEFT_ALONE_SECONDS", -1.0)
    deletion.mark(database, young.id)
    with database.write() as connection:  # two times within one tick of the clock would have no order
        earlier = tables.job.c.deleted_at - 1.0
        connection.execute(tables.job.update().where(tables.job.c.id == young.id).values(deleted_at=earlier))
    deletion.postpone(database, old.id)
    assert [job.id for job in deletion.unfinished(database, limit=9)] == [young.id, old.id]
    assert jobs.get(database, live.id).id == live.id
