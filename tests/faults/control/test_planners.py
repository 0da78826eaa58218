"""Who plans a job: one planner at a time, another after it died; and what a job that cannot be planned holds up.

A planner that is late must leave alone what the job has become meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import redis

from pipeline.engines.base import Cancellation
from pipeline.execution.attempt import execute
from pipeline.jobs.plan import plan_job
from pipeline.jobs.submit import submit_job
from pipeline.output.finalize import finalize_job
from pipeline.process.heartbeat import LeaseKeeper
from pipeline.process.runtime import Runtime, start
from pipeline.worker.worker import PLANNERS, Worker
from storage import failpoints
from storage.broker import PLAN
from storage.errors import IllegalTransition, InvalidSettings, RowmillError, Unreachable
from storage.queue import claims, jobs
from storage.records import Job
from storage.sql import tables
from storage.sql.database import now
from storage.states import JobState
from tests.faults.driver import KILLED, World, wait_until


def _run_shards(runtime: Runtime, job: Job, count: int) -> None:
    with LeaseKeeper(runtime.database, worker_id=runtime.worker.id, lease_seconds=60.0) as keeper:
        for _ in range(count):
            claim = claims.claim(runtime.database, owner=runtime.worker.id, lease_seconds=60.0, job_id=job.id)
            assert claim is not None
            execute(runtime, claim, keeper, Cancellation())


@pytest.mark.parametrize("input_is_there", [True, False])
def test_a_planner_that_is_late_deletes_nothing(world: World, input_is_there: bool) -> None:
    """Whether it finds the request workable or not: what the first attempts flushed is not its to delete."""
    runtime = start(world.settings)
    try:
        runtime.register()
        job = submit_job(runtime, world.fields(shard_rows=100))  # both planners have read it as it is now
        plan_job(runtime, job)
        _run_shards(runtime, job, 1)
        away = world.input.with_suffix(".away")
        if not input_is_there:
            world.input.rename(away)
        with pytest.raises(IllegalTransition):
            plan_job(runtime, job)
        if not input_is_there:
            away.rename(world.input)
        _run_shards(runtime, job, 1)
        assert finalize_job(runtime, job.id) is not None
        world.check(job.id)
    finally:
        runtime.close()


# -- one planner at a time


@pytest.fixture
def worker(world: World) -> Iterator[Worker]:
    with another(world) as made:
        yield made


@contextmanager
def another(world: World) -> Iterator[Worker]:
    made = Worker(world.settings)
    try:
        yield made
    finally:
        failpoints.disarm()
        made.close()


def waiting(world: World, name: str) -> str:
    """A job that waits for its plan."""
    return submit_job(world.client._runtime, world.fields(output=str(world.home / name), shard_rows=100)).id


def try_again_now(world: World) -> None:
    with world.database.write() as connection:
        connection.execute(tables.job.update().values(finalize_until=now() - 1.0))


def test_a_job_has_one_planner_for_as_long_as_it_takes(world: World) -> None:
    """Longer than its lease: each further wake-up returns at once, in its process and in others."""
    world.replace_settings(lease_seconds=2.0)
    job = waiting(world, "out")
    go, begun = threading.Event(), []

    def hold() -> None:
        begun.append(threading.get_ident())
        assert go.wait(60)

    failpoints.arm("plan.claimed", hold)
    with another(world) as worker, another(world) as other, ThreadPoolExecutor(1) as pool:
        planning = pool.submit(worker.plan)
        try:
            wait_until(lambda: begun, "the planner")
            end = world.database.clock() + 2 * world.settings.lease_seconds
            while world.database.clock() < end:
                worker.plan()
                other.plan()
            assert world.job(job).state is JobState.VALIDATING
        finally:
            go.set()
        planning.result(60)
    assert world.job(job).state is JobState.QUEUED
    assert len(begun) == 1


def test_long_plans_leave_threads_for_the_tick(world: World, worker: Worker) -> None:
    """However many jobs wait, as many as there are planners are planned at a time; none is forgotten."""
    ids = [waiting(world, f"out-{n}") for n in range(5)]
    go, begun = threading.Event(), []

    def hold() -> None:
        begun.append(threading.get_ident())
        assert go.wait(60)

    failpoints.arm("plan.claimed", hold)
    worker.start()
    try:
        for _ in ids:
            worker.wake_up(PLAN)
        wait_until(lambda: len(begun) >= PLANNERS, "the planners")
        worker.tick()
        assert len(begun) == PLANNERS
    finally:
        go.set()
    wait_until(lambda: {world.job(job).state for job in ids} == {JobState.QUEUED}, "the plans")
    assert len(begun) == len(ids)
    assert len(set(begun)) == PLANNERS


def test_a_planner_that_dies_is_followed_after_its_lease(world: World, worker: Worker) -> None:
    job = waiting(world, "out")
    dying = world.worker(arm={"plan.claimed": "exit"}, lease_seconds=3600.0)
    assert dying.join() == KILLED, dying.err
    worker.plan()
    assert world.job(job).state is JobState.VALIDATING, "its lease has not run out"
    try_again_now(world)
    worker.plan()
    assert world.job(job).state is JobState.QUEUED


# -- a job that cannot be planned


def fails_for(count: int, error: Exception) -> Callable[[], None]:
    """Raises ``error`` the first ``count`` times."""
    left = [error] * count

    def fail() -> None:
        if left:
            raise left.pop()

    return fail


@pytest.mark.parametrize("error", [Unreachable("the bucket is away"), ValueError("the bucket is away")])
def test_a_cause_that_may_pass_is_told_and_tried_again(world: World, worker: Worker, error: Exception) -> None:
    """And the jobs behind it are planned."""
    first, second = waiting(world, "one"), waiting(world, "two")
    failpoints.arm("plan.claimed", fails_for(1, error))
    worker.plan()
    assert world.job(second).state is JobState.QUEUED
    status = world.client.job(first).status()
    assert status.state is JobState.VALIDATING
    assert "tried again" in str(status.error)
    assert "the bucket is away" in str(status.error)
    worker.plan()
    assert world.job(first).state is JobState.VALIDATING, "not at once"
    try_again_now(world)
    worker.plan()
    assert world.job(first).state is JobState.QUEUED
    assert world.job(first).error is None


@pytest.mark.parametrize("error", [InvalidSettings("nonsense", field="storage_options"), RowmillError("nonsense")])
def test_a_cause_that_stays_refuses_the_job(world: World, worker: Worker, error: RowmillError) -> None:
    first, second = waiting(world, "one"), waiting(world, "two")
    failpoints.arm("plan.claimed", fails_for(1, error))
    worker.plan()
    assert world.job(second).state is JobState.QUEUED
    refused = world.job(first)
    assert refused.state is JobState.FAILED
    assert "nonsense" in str(refused.error)
    world.client.job(first).retry()
    worker.plan()
    assert world.job(first).state is JobState.QUEUED


# -- draining, and waking


def test_a_worker_that_drains_begins_no_other_plan_and_publishes_no_other_job(world: World, worker: Worker) -> None:
    ids = [waiting(world, "one"), waiting(world, "two")]
    failpoints.arm("plan.claimed", lambda: worker.drain(3600.0))
    worker.plan()
    assert sorted(world.job(job).state for job in ids) == [JobState.QUEUED, JobState.VALIDATING]
    failpoints.disarm()
    for job in ids:
        jobs.request_stop(world.database, job, "cancelled", actor="test")
    worker.finalize()
    assert {world.job(job).state for job in ids} == {JobState.CANCELLING}
    with another(world) as other:
        other.finalize()
    assert {world.job(job).state for job in ids} == {JobState.CANCELLED}


@pytest.mark.postgres
def test_a_retry_sends_no_more_wake_ups_than_slots_are_free(broker_world: World) -> None:
    """Of a thousand shards most wait in the database, not in the broker."""
    world = broker_world
    job = world.submit(shard_rows=2)
    jobs.request_stop(world.database, job, "cancelled", actor="test")
    fleet = Worker(world.settings, queues=["fake"], slots=3)
    try:
        fleet.finalize()
        assert world.job(job).state is JobState.CANCELLED
        world.client.job(job).retry()
        assert world.job(job).n_open == 100
        with redis.Redis.from_url(str(world.settings.broker_url)) as broker:
            assert broker.llen("fake") == 3
    finally:
        fleet.close()
