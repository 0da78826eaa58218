"""A worker that lacks what a job needs, or that is told to end while an engine loads."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.engines import registry
from pipeline.engines.base import Cancellation
from pipeline.engines.fake.engine import FakeEngine
from pipeline.worker import embedded
from pipeline.worker.worker import Worker
from storage.errors import EngineMissing
from storage.queue import jobs
from storage.records import Job
from storage.sql import tables
from storage.states import AttemptState, JobState, ShardState
from tests.faults.driver import World

MISSING = "the engine is not installed on this machine"


class Equipped(FakeEngine):
    """The fake engine, with a load that a test can hold up or break."""

    on_load: Callable[[], None]

    def load(self) -> None:
        type(self).on_load()
        super().load()


def _missing() -> None:
    raise EngineMissing(MISSING)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Equipped]]:
    monkeypatch.setattr(registry, "BUILT_IN", {"fake": f"{__name__}:Equipped"})
    Equipped.on_load = lambda: None
    yield Equipped


def worker_of(world: World) -> Worker:
    return Worker(world.settings, engines=["fake"], queues=["fake"], slots=1)


def job_of(world: World, job_id: str) -> Job:
    return jobs.get(world.database, job_id)


def now_due(world: World) -> None:
    """The backoff is over."""
    with world.database.write() as connection:
        connection.execute(tables.shard.update().values(run_after=0.0))


def test_a_badly_equipped_worker_fails_its_attempt_and_leaves_the_job_to_others(world: World) -> None:
    job_id = world.submit()
    bad, good = worker_of(world), worker_of(world)
    try:
        Equipped.on_load = _missing
        bad.run("fake")
        (attempt,) = world.attempts(job_id)
        (shard,) = world.rows("shard")
        assert (attempt.state, shard.state, shard.n_fail) == (AttemptState.FAILED, ShardState.READY, 1)
        assert MISSING in attempt.error and MISSING in shard.error
        assert job_of(world, job_id).state is JobState.IN_PROGRESS
        now_due(world)
        bad.run("fake")
        assert len(world.attempts(job_id)) == 1, "it would spend the budget of every shard"
        Equipped.on_load = lambda: None
        good.run("fake")
        good.finalize()
    finally:
        bad.close()
        good.close()
    world.check(job_id)


def test_what_no_worker_has_fails_the_job_when_a_budget_is_spent(world: World) -> None:
    world.replace_settings(max_failures=2)
    job_id = world.submit(shard_rows=50)
    Equipped.on_load = _missing
    for _ in range(2):
        one = worker_of(world)
        now_due(world)
        one.run("fake")
        one.close()
    assert job_of(world, job_id).state is JobState.CANCELLING
    assert len(world.attempts(job_id)) == 2, "other shards would fare no better"
    assert MISSING in str(job_of(world, job_id).error)


def test_the_embedded_mode_says_so_at_once(world: World) -> None:
    job_id = world.submit()
    Equipped.on_load = _missing
    runtime = world.client._runtime
    status = embedded.run_job(runtime, job_of(world, job_id), interrupt=Cancellation())
    assert status.state is JobState.FAILED
    assert len(world.attempts(job_id)) == 1
    assert MISSING in str(job_of(world, job_id).error)


@pytest.mark.parametrize("how", ["drain", "cancel"])
def test_a_worker_that_is_told_to_end_while_an_engine_loads(world: World, how: str) -> None:
    """The shard is handed back, or ended, at once and at no cost; loading may take as long as it takes."""
    job_id = world.submit()
    loading, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        loading.set()
        go_on.wait()

    Equipped.on_load = hold
    worker = worker_of(world)
    thread = threading.Thread(target=worker.run, args=("fake",))
    thread.start()
    try:
        assert loading.wait(60)
        if how == "drain":
            worker.flush()
        else:
            world.client.job(job_id).cancel()
            worker._keeper.heartbeat()
        thread.join(60)
        assert not thread.is_alive()
    finally:
        go_on.set()
        worker.close()
    (attempt,) = world.attempts(job_id)
    (shard,) = world.rows("shard")
    ended: dict[str, tuple[Any, Any]] = {
        "drain": (AttemptState.RELEASED, ShardState.READY),
        "cancel": (AttemptState.CANCELLED, ShardState.CANCELLED),
    }
    assert (attempt.state, shard.state) == ended[how]
    assert (shard.n_fail, shard.n_crash, shard.n_lost) == (0, 0, 0)


def test_the_log_names_the_work(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipeline.worker.worker")
    job_id = world.submit(tenant="ada")
    worker = worker_of(world)
    try:
        worker.run("fake")
        worker.finalize()
    finally:
        worker.close()
    begins, ends, published = (record.getMessage() for record in caplog.records if job_id in record.getMessage())
    what = f"job {job_id} of tenant ada: shard 0, attempt 1"
    assert begins == f"{what} begins: 200 rows to compute"
    assert re.fullmatch(re.escape(f"{what} succeeded: 200 rows computed in ") + r"\d+\.\d s", ends)
    assert published == f"job {job_id} of tenant ada completed: 200 rows"
