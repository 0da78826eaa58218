"""Deaths while a job is planned or published are under a budget, on every database; a polite end costs nothing."""

from __future__ import annotations

import pytest

from storage.queue import attempts, job_deaths, jobs, plan_leases, publish_leases
from storage.records import Job
from storage.sql import tables
from storage.sql.database import Database
from storage.states import JobState
from tests.storage.jobs_in_sql import output, planned_job, take


def count(database: Database, *owners: str) -> None:
    job_deaths.count(database, max_losses=3, actor="test", owners=owners or None)


def unplanned(database: Database) -> Job:
    job = planned_job(database)
    with database.write() as connection:
        connection.execute(tables.shard.delete())
        connection.execute(tables.job.update().values(state=JobState.VALIDATING, plan={}))
    return job


def with_a_commit(database: Database, shards_: int) -> Job:
    job = planned_job(database, shards=shards_)
    claim = take(database, job)
    attempts.commit(database, claim, output(claim), stats={})
    return job


def lapse(database: Database) -> None:
    """As if the owner had been silent for longer than its lease."""
    with database.write() as connection:
        connection.execute(
            tables.job.update().where(tables.job.c.finalize_owner.is_not(None)).values(finalize_until=1.0)
        )


def told(caplog: pytest.LogCaptureFixture, job: Job) -> list[str]:
    """The actions of the log's warnings, each of which names the job."""
    assert {(vars(record)["job_id"], vars(record)["tenant"]) for record in caplog.records} <= {(job.id, job.tenant)}
    return [str(vars(record)["action"]) for record in caplog.records if record.levelname == "WARNING"]


def test_a_planner_that_dies_each_time_fails_the_job(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    job = unplanned(database)
    for number in range(3):
        assert plan_leases.claim(database, owner=f"w{number}#1", lease_seconds=60.0) is not None
        count(database)  # it lives
        if number == 1:
            count(database, "w1")  # known to be dead
        else:
            lapse(database)
            count(database)
    found = jobs.get(database, job.id)
    assert found.state is JobState.FAILED
    assert "died 3 times while planning it" in str(found.error)
    assert told(caplog, job) == ["plan.lost"] * 3
    assert "w1#1 died while planning it, or lost its lease (2 times in a row)" in caplog.text
    assert plan_leases.claim(database, owner="w4", lease_seconds=60.0) is None


def test_a_planner_that_gives_its_job_back_is_not_dead(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    job = unplanned(database)
    for number in range(5):
        assert plan_leases.claim(database, owner=f"w{number}", lease_seconds=60.0) is not None
        plan_leases.release(database, f"w{number}")
        count(database)
        assert plan_leases.claim(database, owner=f"w{number}", lease_seconds=60.0) is not None
        plan_leases.postpone(database, job.id, owner=f"w{number}", error="away", delay=-1.0)
        count(database, f"w{number}")
    assert jobs.get(database, job.id).state is JobState.VALIDATING
    assert told(caplog, job) == []


@pytest.mark.parametrize("stopped", [None, "cancelled", "expired"])
def test_a_finalizer_that_dies_each_time_ends_the_job(
    database: Database, stopped: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    job = with_a_commit(database, 1 if stopped is None else 2)
    if stopped is not None:
        jobs.request_stop(database, job.id, stopped, actor="test")
    for number in range(3):
        claimed = publish_leases.claim_finalize(database, owner=f"w{number}", lease_seconds=60.0)
        assert claimed is not None
        lapse(database)
        count(database)
    found = jobs.get(database, job.id)
    assert found.state == (stopped or "failed")
    assert "died 3 times while publishing it" in str(found.error)
    assert publish_leases.claim_finalize(database, owner="w4", lease_seconds=60.0) is None
    # Of the next tries all count anew.
    with database.write() as connection:
        connection.execute(tables.job.update().values(state=JobState.FINALIZING))
    assert publish_leases.claim_finalize(database, owner="w5", lease_seconds=60.0) is not None
    count(database, "w5")
    assert jobs.get(database, job.id).state is JobState.FINALIZING
