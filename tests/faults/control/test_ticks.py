"""A round of maintenance: one part that fails, or a clock that is wrong, stops nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from pipeline.worker import maintenance
from pipeline.worker.worker import Worker
from storage.fleet import garbage, maintenance_lock
from storage.sql import tables
from storage.sql.database import Database, now
from storage.states import JobState
from tests.faults.control.test_schedules import NEW_YEARS, add, come_due, fires
from tests.faults.driver import World, wait_until

NOWHERE = "nosuch://bucket/out/.rowmill/job"
"""As a bucket that is gone, or whose library this host lacks: no call about it succeeds."""


@pytest.fixture
def worker(world: World) -> Iterator[Worker]:
    made = Worker(world.settings)
    yield made
    made.close()


def began_earlier(database: Database, seconds: float) -> None:
    with database.write() as connection:
        connection.execute(tables.tick.update().values(at=now() - seconds))


def queued_garbage(world: World) -> dict[str, Any]:
    return {row.uri: row for row in world.rows("gc_queue")}


def test_garbage_that_cannot_be_deleted_holds_up_nothing(world: World, worker: Worker) -> None:
    """It is the longest due; what is due after it goes, schedules fire, and its next try is ever later."""
    job = world.submit()
    leftover = world.home / "leftover"
    leftover.mkdir()
    (leftover / "part-0.parquet").touch()
    garbage.enqueue(world.database, job, NOWHERE, delay=-60.0)
    garbage.enqueue(world.database, job, str(leftover), delay=0.0)
    with world.database.write() as connection:
        connection.execute(tables.job.update().values(state=JobState.COMPLETED))
    add(world)
    come_due(world, NEW_YEARS[0])
    worker.tick()
    assert len(fires(world)) == 1
    assert not (leftover / "part-0.parquet").exists()
    waits = []
    for times in (1, 2, 3):
        entry = queued_garbage(world)[NOWHERE]
        assert entry.n_fail == times
        waits.append(entry.not_before - world.database.clock())
        with world.database.write() as connection:
            connection.execute(tables.gc_queue.update().values(not_before=now() - 1.0))
        maintenance.collect_garbage(worker.runtime)
    assert list(queued_garbage(world)) == [NOWHERE]
    assert 0 < waits[0] < waits[1] < waits[2]


def test_the_next_try_at_garbage_is_never_further_away_than_a_day(world: World) -> None:
    job = world.submit()
    garbage.enqueue(world.database, job, NOWHERE, delay=-1.0)
    with world.database.write() as connection:
        connection.execute(tables.gc_queue.update().values(n_fail=1_000_000))
    (item,) = garbage.due(world.database)
    assert garbage.postpone(world.database, item) == garbage.LONGEST_DELAY_SECONDS


def test_garbage_takes_no_longer_than_it_may(world: World, worker: Worker) -> None:
    """What is left when the time is over stays queued, and goes in a later round."""
    job = world.submit()
    for name in ("one", "two"):
        (world.home / name).mkdir()
        garbage.enqueue(world.database, job, str(world.home / name), delay=-1.0)
    with world.database.write() as connection:
        connection.execute(tables.job.update().values(state=JobState.COMPLETED))
    assert maintenance.collect_garbage(worker.runtime, budget=0.0) == 0
    assert len(queued_garbage(world)) == 2
    assert maintenance.collect_garbage(worker.runtime) == 2
    assert queued_garbage(world) == {}


@pytest.mark.parametrize("step", ["reap", "expire", "wind_down", "collect_garbage", "delete_jobs", "fire_schedules"])
def test_a_step_that_fails_holds_up_no_other(
    world: World, worker: Worker, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    names = ("reap", "expire", "wind_down", "fire_schedules", "collect_garbage", "delete_jobs")
    for name in names:
        monkeypatch.setattr(maintenance, name, _noted(getattr(maintenance, name), done, fails=name == step))
    monkeypatch.setattr(worker.wakeups, "plan", lambda: done.append("plan"))
    monkeypatch.setattr(worker.wakeups, "finalize", lambda: done.append("finalize"))
    worker.tick()
    rest = ["plan", "finalize", "collect_garbage", "delete_jobs"]
    assert done == ["reap", "expire", "wind_down", "fire_schedules", *rest]


def test_what_ends_a_process_ends_a_round(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(maintenance, "expire", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.tick()


def _noted(step: Callable[..., Any], done: list[str], *, fails: bool) -> Callable[..., Any]:
    def noted(*arguments: Any, **named: Any) -> Any:
        done.append(step.__name__)
        if fails:
            raise RuntimeError("scripted by the test")
        return step(*arguments, **named)

    return noted


def test_ticks_that_pile_up_cost_a_statement_each(world: World, worker: Worker) -> None:
    """By the database's clock, whatever this machine's says: half of ``tick_seconds`` after the last one began."""
    worker.tick()
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "tick" in statement or "schedule" in statement or "shard" in statement:
            statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        began_earlier(world.database, 0.0)
        statements.clear()
        for _ in range(5):
            worker.tick()
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert len(statements) == 5
    add(world)
    come_due(world, NEW_YEARS[0])
    began_earlier(world.database, worker.runtime.settings.tick_seconds)
    worker.tick()
    assert len(fires(world)) == 1


def test_of_many_who_ask_one_may_tick(world: World) -> None:
    databases = [Database(str(world.settings.effective_database_url)) for _ in range(8)]
    world.submit()  # the schema is there
    barrier = Barrier(len(databases))

    def take(database: Database) -> bool:
        barrier.wait(60)
        return maintenance_lock.take(database, every=30.0)

    try:
        for seconds in (None, 31.0, -3600.0):  # at first, when it is due, and after the clock was set back
            if seconds is not None:
                began_earlier(world.database, seconds)
            with ThreadPoolExecutor(len(databases)) as pool:
                assert sum(pool.map(take, databases)) == 1
            assert not maintenance_lock.take(databases[0], every=30.0)
    finally:
        for database in databases:
            database.close()


@pytest.mark.postgres
@pytest.mark.parametrize("kind", ["celery beat", "rowmill beat"])
def test_no_clock_but_the_databases_decides_whether_a_tick_counts(broker_world: World, kind: str) -> None:
    """Beat stamps no expiry: by its own clock it would say when, and a worker whose clock is ahead would drop all."""
    world = broker_world
    if kind == "celery beat":
        world.celery("beat")
    else:
        world.client._wakeups.tick()
    with redis.Redis.from_url(str(world.settings.broker_url)) as broker:
        wait_until(lambda: broker.llen("control"), "a tick")
        (message,) = broker.lrange("control", 0, 0)
    envelope = json.loads(message)
    assert envelope["headers"]["task"] == "rowmill.tick"
    assert envelope["headers"]["expires"] is None
    assert "expiration" not in envelope["properties"]
    assert json.loads(base64.b64decode(envelope["body"]))[0] == []
