"""Faults 8 to 11: a broker that forgets, is away, repeats itself or is ahead of the database. Real Celery and Redis.

Only on PostgreSQL: workers that share a broker share a database server too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa
from celery import Celery

from storage import tables
from storage.states import AttemptState, JobState, ShardState
from storage.wakeups import PLAN, RUN
from tests.faults.driver import World, wait_until
from tests.servers import Server

pytestmark = pytest.mark.postgres


def test_08_flushall(broker_world: World, tmp_path: Path) -> None:
    """Fault 8: Redis FLUSHALL under running workers: every message is gone, and every binding of Celery's queues.

    The beat wakes the workers again: for the job that is running, and for one whose messages nobody has sent.
    """
    world, gate = broker_world, tmp_path / "gate"
    world.celery("worker")
    world.celery("beat")
    job = world.client.submit(
        **world.fields(shard_rows=10, engine_options={"gate_file": str(gate), "gate_after_rows": 25})
    ).id
    world.wait_for_flushes(job, 20)
    other = world.submit(output=str(tmp_path / "other"), shard_rows=10)
    redis.Redis.from_url(str(world.settings.broker_url)).flushall()
    gate.touch()
    world.wait(job, JobState.COMPLETED)
    world.wait(other, JobState.COMPLETED)
    assert set(world.attempt_states(job)) == {AttemptState.SUCCEEDED}
    world.check(job)


def test_09_no_broker(broker_world: World, redis_server: Server, tmp_path: Path) -> None:
    """Fault 9: Redis is down. A submit succeeds, shards that run commit; once it is back, all complete."""
    world, gate = broker_world, tmp_path / "gate"
    world.celery("worker")
    world.celery("beat")
    job = world.client.submit(
        **world.fields(shard_rows=50, engine_options={"gate_file": str(gate), "gate_after_rows": 20})
    ).id
    world.wait_for_flushes(job, 20)
    running = [shard.id for shard in world.shards(job) if shard.state == ShardState.RUNNING]
    assert running
    redis_server.kill()
    try:
        gate.touch()
        other = world.client.submit(**world.fields(output=str(tmp_path / "other"))).id
        assert world.job(other).state is JobState.VALIDATING

        def committed() -> bool:
            states = {shard.id: shard.state for shard in world.shards(job)}
            return all(states[shard] == ShardState.COMMITTED for shard in running)

        wait_until(committed, "the commit of the shards that were running")
    finally:
        redis_server.start()
    world.wait(job, JobState.COMPLETED)
    world.wait(other, JobState.COMPLETED)
    assert set(world.attempt_states(job)) == {AttemptState.SUCCEEDED}
    world.check(job)


def test_10_every_message_ten_times(broker_world: World, tmp_path: Path) -> None:
    """Fault 10: each message is delivered ten times, to two workers of two threads. Each shard is claimed once."""
    world = broker_world
    job = world.submit(shard_rows=10)
    unplanned = world.client.submit(**world.fields(output=str(tmp_path / "other"), shard_rows=10)).id
    world.client._wakeups.run("fake", 20)
    with redis.Redis.from_url(str(world.settings.broker_url)) as broker:
        for queue, expected in (("control", 1), ("fake", 20)):
            messages = broker.lrange(queue, 0, -1)
            assert len(messages) == expected
            for message in messages:
                broker.rpush(queue, *[message] * 9)
    for _ in range(2):
        world.celery("worker")
    world.wait(job, JobState.COMPLETED)
    world.wait(unplanned, JobState.COMPLETED)
    for each in (job, unplanned):
        assert world.attempt_states(each) == [AttemptState.SUCCEEDED] * 20
        assert world.events(each, "shard.running") == 20
        assert world.events(each, "job.queued") == 1
    world.check(job)


def test_11_a_message_before_its_commit(broker_world: World) -> None:
    """Fault 11: a message arrives before the commit that it follows. It starts nothing; the next tick picks it up."""
    world = broker_world
    world.celery("worker")
    control = Celery(broker=str(world.settings.broker_url), set_as_current=False).control

    def handled(name: str) -> int:
        """How many of these tasks the worker has been through; 0 while it is at one."""
        inspect = control.inspect(timeout=0.2)
        active = inspect.active()
        if not active or any(active.values()):
            return 0
        return sum(worker["total"].get(name, 0) for worker in (inspect.stats() or {}).values())

    sent: list[str] = []
    wakeups = world.client._wakeups

    def before_commit(connection: sa.Connection) -> None:
        state = connection.execute(sa.select(tables.job.c.state)).scalar()
        if state == JobState.VALIDATING and not sent:
            sent.append(PLAN)
            wakeups.plan()
            wait_until(lambda: handled(PLAN) == 1, "the message that asks for a plan")
        elif state == JobState.QUEUED and RUN not in sent:
            sent.append(RUN)
            wakeups.run("fake", 4)
            wait_until(lambda: handled(RUN) == 4, "the messages that ask for a claim")

    with _before_each_commit(world, before_commit):
        job = world.submit(shard_rows=50)
    assert sent == [PLAN, RUN]
    assert world.job(job).state is JobState.QUEUED
    assert world.attempts(job) == []
    world.celery("beat")
    world.wait(job, JobState.COMPLETED)
    assert world.events(job, "job.queued") == 1
    world.check(job)


@contextmanager
def _before_each_commit(world: World, hook: Callable[[sa.Connection], None]) -> Iterator[None]:
    engine = world.database._writer
    sa.event.listen(engine, "commit", hook)
    try:
        yield
    finally:
        sa.event.remove(engine, "commit", hook)
