"""Faults 8 to 11, 30 and 31: a broker that forgets, is away, repeats itself, is ahead of the database, or brings
nonsense. Real Celery and Redis.

Only on PostgreSQL: workers that share a broker share a database server too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import redis
import sqlalchemy as sa
from celery import Celery
from hypothesis import strategies

from pipeline.worker.worker import Worker
from storage.fleet import workers
from storage.sql import tables
from storage.states import AttemptState, JobState
from tests.examples import examples
from tests.faults.driver import World, wait_until
from tests.forged import FORGED, HEADERS, PROPERTIES, encoded, message
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
    """Fault 9: Redis goes away under a job at work. It is run to its end, and so is a job that is submitted meanwhile.

    Once it is back the workers listen again (celery#10205): a job is planned and run that only messages tell of.
    """
    world, gate = broker_world, tmp_path / "gate"
    worker = world.celery("worker")
    fields = world.fields(shard_rows=10, engine_options={"gate_file": str(gate), "gate_after_rows": 25})
    job = world.client.submit(**fields).id
    world.wait_for_flushes(job, 20)
    redis_server.kill()
    try:
        gate.touch()
        other = world.client.submit(**world.fields(output=str(tmp_path / "other"))).id
        world.wait(job, JobState.COMPLETED)
        world.wait(other, JobState.COMPLETED)
    finally:
        redis_server.start()
    assert set(world.attempt_states(job)) == {AttemptState.SUCCEEDED}
    world.check(job)
    assert worker.end() == 0, worker.err

    listening = world.celery("worker", poll_seconds=3600.0, tick_seconds=3600.0)
    broker = redis.Redis.from_url(str(world.settings.broker_url))
    for number in range(2):
        _wait_until_taken(broker)
        redis_server.kill()
        redis_server.start()
        world.client._wakeups._silent_until = 0.0
        late = world.submit(output=str(tmp_path / f"late-{number}"))
        wait_until(lambda: _sent(world), "a message that the broker took")
        world.wait(late, JobState.COMPLETED)
    assert listening.running()


def _wait_until_taken(broker: redis.Redis) -> None:
    """Until somebody listens and has taken a message: one that says nothing to anybody."""
    broker.lpush("fake", "nobody")
    wait_until(lambda: not broker.exists("fake"), "a worker that listens")


def _sent(world: World) -> bool:
    """Whether a wake-up for a shard could be sent."""
    wakeups = world.client._wakeups
    wakeups.run("fake")
    sent, wakeups._silent_until = wakeups._silent_until == 0.0, 0.0
    return sent


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
    """Fault 11: a message arrives before the commit that it follows. It starts nothing; the next look finds it."""
    world = broker_world
    worker = Worker(world.settings, engines=["fake"], queues=["control", "fake"], slots=1)
    woken: list[JobState] = []

    def before_commit(connection: sa.Connection) -> None:
        state = connection.execute(sa.select(tables.job.c.state)).scalar()
        if state in (JobState.VALIDATING, JobState.QUEUED) and state not in woken:
            woken.append(state)
            worker.plan()
            worker.run("fake")

    try:
        with _before_each_commit(world, before_commit):
            job = world.submit(shard_rows=50)
        assert woken == [JobState.VALIDATING, JobState.QUEUED]
        assert world.job(job).state is JobState.QUEUED
        assert world.attempts(job) == []
        worker.start()
        world.wait(job, JobState.COMPLETED)
    finally:
        worker.close()
    assert world.events(job, "job.queued") == 1
    world.check(job)


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("body", "content-encoding", "content-type", "headers", "properties")
HEADER_NAMES = (*HEADERS, "eta", "expires", "timelimit", "compression", "retries", "args")
NONSENSE = strategies.one_of(
    strategies.binary(min_size=1),
    JSON.map(json.dumps),
    JSON.map(lambda value: json.dumps(message(encoded(json.dumps(value))))),
    strategies.builds(
        lambda field, value: json.dumps(message() | {field: value}), strategies.sampled_from(FIELDS), JSON
    ),
    strategies.builds(
        lambda name, value: json.dumps(message(headers=HEADERS | {name: value})),
        strategies.sampled_from(HEADER_NAMES),
        JSON,
    ),
    strategies.builds(
        lambda name, value: json.dumps(message(properties=PROPERTIES | {name: value})),
        strategies.sampled_from(tuple(PROPERTIES)),
        JSON,
    ),
    strategies.sampled_from(FIELDS).map(lambda field: json.dumps({k: v for k, v in message().items() if k != field})),
)


def test_30_messages_that_make_no_sense(broker_world: World) -> None:
    """Fault 30: whatever lies on a queue, the worker drops it, counts it, and goes on; it does not come back."""
    world = broker_world
    worker = world.celery("worker")
    broker = redis.Redis.from_url(str(world.settings.broker_url))
    pushed = 2 * len(FORGED)
    for queue in ("fake", "control"):
        broker.lpush(queue, *FORGED)

    @hypothesis.settings(max_examples=examples(150), database=None)
    @hypothesis.given(strategies.sampled_from(["fake", "control"]), NONSENSE)
    def push(queue: str, nonsense: bytes | str) -> None:
        nonlocal pushed
        pushed += broker.lpush(queue, nonsense) > 0

    push()
    wait_until(lambda: not broker.exists("fake", "control") or not worker.running(), "the end of the messages")
    assert worker.running(), worker.err
    Celery(broker=str(world.settings.broker_url), set_as_current=False).control.shutdown()
    job = world.submit()
    world.wait(job, JobState.COMPLETED)
    world.check(job)
    assert worker.running(), worker.err
    assert "Traceback" not in worker.err
    assert not broker.exists("unacked", "unacked_index"), "nothing is kept aside"
    # Some of what was drawn at random is a wake-up after all, such as one with another id.
    dropped = wait_until(lambda: workers.listed(world.database)[0].dropped_messages, "the count, at a heartbeat")
    assert 2 * len(FORGED) < dropped <= pushed
    assert worker.end() == 0, worker.err
    assert not broker.exists("fake", "control"), "nothing is given back"


def test_30_a_queue_that_is_none(broker_world: World) -> None:
    """A key of another type where the queue should be: Redis answers each request with an error."""
    world = broker_world
    broker = redis.Redis.from_url(str(world.settings.broker_url))
    broker.set("fake", "not a list")
    worker = world.celery("worker")
    job = world.client.submit(**world.fields()).id
    world.wait(job, JobState.COMPLETED)
    assert worker.end() == 0, worker.err


def test_31_work_begins_without_a_broker(broker_world: World, redis_server: Server) -> None:
    """Fault 31: Redis is away from the start. Worker and beat wait for it, and work; and end when they are told to."""
    world = broker_world
    redis_server.kill()
    try:
        worker = world.celery("worker")
        job = world.client.submit(**world.fields(shard_rows=10)).id
        world.wait(job, JobState.COMPLETED)
        world.check(job)
        assert worker.end() == 0, worker.err
        assert workers.listed(world.database) == []
    finally:
        redis_server.start()


@contextmanager
def _before_each_commit(world: World, hook: Callable[[sa.Connection], None]) -> Iterator[None]:
    engine = world.database._writer
    sa.event.listen(engine, "commit", hook)
    try:
        yield
    finally:
        sa.event.remove(engine, "commit", hook)
