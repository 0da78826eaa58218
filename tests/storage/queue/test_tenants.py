"""Tenants and what they may use: refused when it is used up, counted once, with the job's own counters."""

from __future__ import annotations

import threading

import pytest

from storage.errors import Conflict, InvalidJob, NotFound, QuotaExceeded
from storage.queue import attempts, jobs, reopen
from storage.records import NewJob
from storage.sql import tables
from storage.sql.database import Database
from storage.states import JobState
from storage.tenants import tenants
from storage.tenants.tenants import Usage
from tests.storage.jobs_in_sql import new_job, output, part, planned_job, stored, take


def finish(database: Database, tenant: str, tokens: int = 0, **values: object) -> str:
    """A job of one shard of ten rows that is committed; its id."""
    job = planned_job(database, tenant=tenant, shards=1, **values)
    claim = take(database, job)
    attempts.flush(database, claim, part(claim, list(range(10))), tokens={"prompt_tokens": tokens, "cached_tokens": 1})
    attempts.commit(database, claim, output(claim), stats={})
    return job.id


def end(database: Database, job_id: str) -> None:
    with database.write() as connection:
        connection.execute(
            tables.job.update().where(tables.job.c.id == job_id).values(state=JobState.COMPLETED, ended_at=1.0)
        )


def test_a_tenant_is_added_changed_listed_and_removed(database: Database) -> None:
    tenants.add(database, "b", weight=2.0, max_running=3)
    tenants.add(database, "a")
    with pytest.raises(Conflict, match="already"):
        tenants.add(database, "a")
    changed = tenants.change(database, "b", max_running=None, rows_per_day=2**40)
    assert (changed.weight, changed.max_running, changed.rows_per_day) == (2.0, None, 2**40)
    assert [tenant.name for tenant in tenants.listed(database)] == ["a", "b"]
    for call in (tenants.get, tenants.change, tenants.remove):
        with pytest.raises(NotFound):
            call(database, "nobody")
    job = planned_job(database, tenant="a")
    with pytest.raises(Conflict, match="1 live jobs"):
        tenants.remove(database, "a")
    jobs.request_stop(database, job.id, "cancelled", actor="test")
    end(database, job.id)
    tenants.remove(database, "a")
    assert [tenant.name for tenant in tenants.listed(database)] == ["b"]
    assert jobs.get(database, job.id).tenant == "a"


@pytest.mark.parametrize(
    "values", [{"weight": 0.0}, {"weight": float("nan")}, {"max_jobs": -1}, {"max_running": 2**31}, {"colour": 1}]
)
def test_values_that_make_no_sense_are_refused(database: Database, values: dict[str, object]) -> None:
    with pytest.raises(InvalidJob):
        tenants.add(database, "a", **values)
    with pytest.raises(InvalidJob):
        tenants.add(database, "no spaces", weight=1.0)
    assert tenants.listed(database) == []


def test_an_unknown_tenant_is_made_or_refused(database: Database) -> None:
    planned_job(database, tenant="made")
    assert tenants.get(database, "made").max_jobs is None
    with pytest.raises(InvalidJob, match="rowmill tenant add other"):
        planned_job(database, tenant="other", new_tenant=False)
    planned_job(database, tenant="made", new_tenant=False)
    assert {row.tenant for row in stored(database, "job")} == {"made"}


def test_live_jobs_are_limited_and_ended_ones_are_not_live(database: Database) -> None:
    tenants.add(database, "t", max_jobs=2)
    first = planned_job(database, tenant="t")
    planned_job(database, tenant="t", idempotency_key="k")
    with pytest.raises(QuotaExceeded, match="2 live jobs of the 2") as caught:
        planned_job(database, tenant="t")
    error = caught.value
    assert (error.quota, error.used, error.limit, error.resets_at, error.exit_code) == ("max_jobs", 2, 2, None, 8)
    # The same work under its key is no further job.
    assert jobs.insert(database, same_request(database), window_seconds=60.0, actor="test").idempotency_key == "k"
    end(database, first.id)
    planned_job(database, tenant="t")
    # A retry makes a job live again.
    with database.write() as connection:
        connection.execute(tables.shard.update().where(tables.shard.c.job_id == first.id).values(state="cancelled"))
        connection.execute(tables.job.update().where(tables.job.c.id == first.id).values(n_failed_shards=1))
    with pytest.raises(QuotaExceeded):
        reopen.reopen(database, first.id, failed_only=True, window_seconds=60.0, actor="test")
    assert jobs.get(database, first.id).state is JobState.COMPLETED


def same_request(database: Database) -> NewJob:
    [row] = [row for row in stored(database, "job") if row.idempotency_key == "k"]
    return new_job(tenant="t", spec={}, spec_hash=row.spec_hash, idempotency_key="k", output_uri="/elsewhere")


def test_the_limit_on_live_jobs_holds_however_many_submit_at_once(database: Database) -> None:
    tenants.add(database, "t", max_jobs=3)
    refused: list[QuotaExceeded] = []
    start = threading.Barrier(8)

    def submit() -> None:
        start.wait()
        try:
            planned_job(database, tenant="t")
        except QuotaExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5
    assert len(stored(database, "job")) == 3


def test_rows_are_counted_when_they_are_known(database: Database) -> None:
    tenants.add(database, "t", rows_per_day=35)
    planned_job(database, tenant="t", shards=2)
    with pytest.raises(QuotaExceeded, match="20 rows today of the 35 it may and the job would add 20") as caught:
        planned_job(database, tenant="t", shards=2)
    day = database.clock() // 86400
    assert caught.value.resets_at in ((day + 1) * 86400, day * 86400)
    states = [row.state for row in stored(database, "job")]
    assert states == ["queued", "validating"]  # the planner refuses it, with this reason
    assert len(stored(database, "shard")) == 2
    planned_job(database, tenant="t", shards=1, rows=15)
    with pytest.raises(QuotaExceeded, match="35 rows today"):
        planned_job(database, tenant="t")
    assert tenants.usage(database, "t") == Usage(3, 0, 35, 0)
    with database.write() as connection:  # a day passes
        connection.execute(tables.tenant_usage.update().values(day=tables.tenant_usage.c.day - 1))
    planned_job(database, tenant="t", shards=3)
    assert tenants.usage(database, "t").rows_today == 30


def test_rows_that_a_retry_computes_again_count_again(database: Database) -> None:
    tenants.add(database, "t", rows_per_day=25)
    job = finish(database, "t")
    end(database, job)
    reopen.reopen(database, job, failed_only=False, window_seconds=60.0, actor="test")
    assert tenants.usage(database, "t").rows_today == 20
    with database.write() as connection:
        connection.execute(tables.shard.update().where(tables.shard.c.gen == 1).values(state="committed"))
    end(database, job)
    with pytest.raises(QuotaExceeded, match="20 rows today of the 25 it may and the job would add 10"):
        reopen.reopen(database, job, failed_only=False, window_seconds=60.0, actor="test")
    assert jobs.get(database, job).gen == 1


def test_tokens_are_counted_once_with_the_jobs_own(database: Database) -> None:
    tenants.add(database, "t", tokens_per_day=100)
    finish(database, "t", tokens=60)
    job = planned_job(database, tenant="t", shards=2)
    claim = take(database, job)
    attempts.flush(database, claim, part(claim, list(range(10))), tokens={"prompt_tokens": 30, "completion_tokens": 20})
    assert tenants.usage(database, "t").tokens_today == 60
    for _ in range(2):  # the answer to the first COMMIT was lost
        attempts.commit(database, claim, output(claim), stats={})
    assert tenants.usage(database, "t") == Usage(2, 0, 30, 110)
    with pytest.raises(QuotaExceeded, match="110 tokens today of the 100"):
        planned_job(database, tenant="t")
    # What was taken in is computed all the same.
    assert take(database, job).shard.idx == 1
    planned_job(database, tenant="another")
