"""A job's rows are put in another order before it runs, and back when it is published: killed anywhere on the way."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.jobs.plan import plan_job
from storage import failpoints
from storage.errors import IllegalTransition, InvalidInput, LeaseLost
from storage.queue import plan_leases
from storage.states import JobState
from tests.faults.driver import KILLED, World, wait_stopped, wait_until

FIELDS: dict[str, Any] = {"order": "prefix", "shard_rows": 40}


@pytest.mark.parametrize(
    "point", ["plan.sampled@1", "plan.spilled@1", "plan.chunk@2", "finalize.publishing@1", "finalize.part@2"]
)
def test_killed_and_run_again(world: World, point: str) -> None:
    """The same command goes on with the same job at once; nothing is computed twice, whatever was half done."""
    name, _, hit = point.partition("@")
    assert world.run(arm={name: f"exit@{hit}"}, **FIELDS).join() == KILLED
    [before] = world.client.jobs()
    assert before.state is (JobState.VALIDATING if name.startswith("plan") else JobState.FINALIZING)
    done = world.client.run(**world.fields(**FIELDS))
    assert done.id == before.id
    assert len(world.shards(done.id)) > 200 // 40
    world.check(done.id)


def test_a_worker_dies_and_another_one_plans(world: World) -> None:
    """Nobody else plans while the first one is at it; when it is dead, its lease runs out."""
    world.replace_settings(lease_seconds=2.0)
    job = world.submit(**FIELDS)
    assert world.job(job).state is JobState.VALIDATING
    first = world.worker(arm={"plan.chunk": "stop@2"})
    wait_stopped(first)
    with pytest.raises(LeaseLost, match="another worker plans"):
        plan_leases.hold(world.database, job, owner="somebody else", lease_seconds=60)
    first.kill()
    with world.worker():
        world.wait(job, JobState.COMPLETED)
    world.check(job)


def test_a_planner_that_is_late_changes_nothing(world: World) -> None:
    """It stood still past its lease; another one has planned the job and runs it, or has finished it, meanwhile."""
    world.replace_settings(lease_seconds=2.0)
    job = world.submit(**FIELDS)
    first = world.worker(arm={"plan.chunk": "stop@2"})
    wait_stopped(first)
    with world.worker():
        world.wait(job, JobState.COMPLETED)
    assert first.end() == 0
    world.check(job)
    with pytest.raises(IllegalTransition):
        plan_leases.hold(world.database, job, owner="somebody else", lease_seconds=60)


def test_cancelled_while_it_is_planned(world: World) -> None:
    job = world.submit(**FIELDS)
    gate = world.home / "gate"
    with world.worker(arm={"plan.spilled": f"wait:{gate}"}):
        wait_until(lambda: gate.with_name("gate.reached").exists(), "the planner at the gate")
        world.client.job(job).cancel()
        gate.touch()
        world.wait(job, JobState.CANCELLED)
    assert not (world.output / "data").exists()


def test_the_input_changes_while_it_is_read(world: World) -> None:
    job = world.submit(**FIELDS)
    runtime = world.client._runtime
    runtime.register()
    failpoints.arm("plan.sampled", lambda: world.input.write_bytes(world.input.read_bytes() + b" "))
    try:
        with pytest.raises(InvalidInput, match="was changed after the job was planned"):
            plan_job(runtime, world.job(job))
    finally:
        failpoints.disarm()
    assert world.job(job).state is JobState.FAILED
