"""Two workers plan the same job: the one that comes too late must leave alone what the job has become meanwhile."""

from __future__ import annotations

import pytest

from pipeline.engines.base import Cancellation
from pipeline.finalize import finalize_job
from pipeline.job import plan_job, submit_job
from pipeline.leases import LeaseKeeper
from pipeline.runtime import Runtime, start
from pipeline.shard import execute
from storage import claims
from storage.errors import IllegalTransition
from storage.records import Job
from tests.faults.driver import World


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
