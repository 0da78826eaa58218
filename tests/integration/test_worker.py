"""``rowmill worker start`` as a process: what it refuses, how it ends, and the control process beside it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config.settings import Settings
from pipeline.process.runtime import start as start_runtime
from storage.fleet import workers
from storage.fleet.workers import WorkerStatus
from storage.sql import tables
from storage.sql.database import now
from storage.states import AttemptState, JobState
from tests.cli.conftest import Rowmill, rowmill  # noqa: F401 - a fixture
from tests.faults.conftest import broker_world  # noqa: F401 - a fixture
from tests.faults.driver import Process, World, wait_until
from tests.servers import Server

pytestmark = pytest.mark.postgres


def start(world: World, *arguments: str, **settings: Any) -> Process:
    """A worker of two slots for the fake engine."""
    command = ["-m", "pipeline.cli.main", "worker", "start", "--engines", "fake", *arguments]
    return world._started(command, "worker", world.settings.model_copy(update=settings))


def known(world: World) -> list[WorkerStatus]:
    return workers.listed(world.database)


def gated(world: World, gate: Path) -> str:
    """A job of which the worker has flushed 20 rows, and which goes on once ``gate`` is there."""
    job = world.client.submit(**world.fields(engine_options={"gate_file": str(gate), "gate_after_rows": 25})).id
    world.wait_for_flushes(job, 20)
    return job


def test_one_command_plans_runs_and_publishes_even_when_every_slot_is_taken(
    broker_world: World,  # noqa: F811
    tmp_path: Path,
) -> None:
    world = broker_world
    beat, worker = world.celery("beat"), start(world, "--slots", "1", log_format="json", log_level="info")
    gate = tmp_path / "gate"
    busy = gated(world, gate)
    # Its one slot is taken, and stays so. Another job is planned all the same, and one without rows is published.
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(world.input).slice(0, 0), empty)
    other = world.client.submit(**world.fields(output=str(tmp_path / "other"))).id
    nothing = world.client.submit(**world.fields(input=str(empty), output=str(tmp_path / "nothing"))).id
    world.wait(other, JobState.QUEUED)
    world.wait(nothing, JobState.COMPLETED)
    roles = {seen.worker.queues: seen for seen in known(world)}
    assert set(roles) == {("fake",), ("control",)}
    assert roles[("fake",)].worker.pid == worker.pid
    assert (roles[("fake",)].worker.slots, roles[("control",)].worker.slots) == (1, 0)
    # The control process is started again when it dies ...
    wait_until(lambda: [item["model"] for item in roles_of(world)[("fake",)].warm] == ["fake"], "a warm engine")
    killed = roles[("control",)].worker
    os.kill(killed.pid, signal.SIGKILL)
    wait_until(lambda: killed.id not in {s.worker.id for s in alive(world)} and len(alive(world)) == 2, "another one")
    gate.touch()
    world.wait(busy, JobState.COMPLETED)
    world.wait(other, JobState.COMPLETED)
    world.check(busy)
    # ... and ends with its worker, however that ends.
    control = roles_of(world)[("control",)].worker.pid
    worker.kill()
    wait_until(lambda: not Path(f"/proc/{control}").exists(), "the end of the control process")
    assert beat.running()
    # What all three processes have written is JSON, line by line.
    records = [json.loads(line) for line in worker.log.read_text().splitlines()]
    assert all(record.keys() >= {"event", "level", "logger", "timestamp"} for record in records)
    ours = [record for record in records if record["logger"].startswith(("pipeline.", "tasks.", "storage.", "rowmill"))]
    assert all("action" in record for record in ours)
    ended = {(r["job_id"], r["shard"], r["attempt"], r["worker"]) for r in ours if r["action"] == "attempt.ended"}
    taker = roles[("fake",)].worker.id
    assert ended >= {(busy, 0, 1, taker), (other, 0, 1, taker)}
    assert {r["job_id"] for r in ours if r["action"] == "job.published"} >= {busy, other, nothing}
    assert "control.restarted" in {record["action"] for record in ours}


def alive(world: World) -> list[WorkerStatus]:
    return [seen for seen in known(world) if Path(f"/proc/{seen.worker.pid}").exists()]


def roles_of(world: World) -> dict[tuple[str, ...], WorkerStatus]:
    return {seen.worker.queues: seen for seen in alive(world)}


def test_the_first_signal_lets_shards_finish_the_second_flushes(
    broker_world: World,  # noqa: F811
    tmp_path: Path,
) -> None:
    world = broker_world
    beat = world.celery("beat")
    first = start(world, drain_grace_seconds=3600.0)
    gate = tmp_path / "gate"
    job = gated(world, gate)
    first.signal(signal.SIGTERM)
    mine = next(seen.worker.id for seen in known(world) if seen.worker.pid == first.pid)
    wait_until(lambda: {s.worker.id: s.state for s in known(world)}[mine] == "draining", "the drain, in the database")
    assert world.attempt_states(job) == [AttemptState.RUNNING], "it is given its time"
    first.signal(signal.SIGTERM)
    assert first.join() == 0, first.err
    assert world.attempt_states(job) == [AttemptState.RELEASED]
    assert known(world) == []

    second = start(world, drain_grace_seconds=3600.0)
    wait_until(lambda: len(world.attempts(job)) == 2, "the second attempt")
    second.signal(signal.SIGHUP)  # as when its terminal is closed
    gate.touch()
    assert second.join() == 0, second.err
    assert world.attempt_states(job) == [AttemptState.RELEASED, AttemptState.SUCCEEDED], "finished within the grace"
    assert beat.running()


def test_it_can_be_asked_to_end_while_the_broker_is_away(
    broker_world: World,  # noqa: F811
    redis_server: Server,
    tmp_path: Path,
) -> None:
    world, gate = broker_world, tmp_path / "gate"
    beat, worker = world.celery("beat"), start(world)
    job = gated(world, gate)
    redis_server.kill()
    try:
        assert len(workers.drain(world.database, [seen.worker.id for seen in known(world)])) == 2
        assert worker.join() == 0, worker.err
        assert world.attempt_states(job) == [AttemptState.RELEASED]
    finally:
        redis_server.start()
    assert known(world) == []
    assert beat.running()


def test_what_it_refuses(
    rowmill: Rowmill,  # noqa: F811
    postgres_empty: str,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Refused before this process turns into another.
    monkeypatch.setattr("pipeline.cli.admin.worker.become", lambda *_: pytest.fail("it would have started"))

    def refused(*arguments: str, **environment: str) -> tuple[int, str]:
        done = Rowmill(rowmill.home, rowmill.environment | environment).inside("worker", "start", *arguments)
        return done.code, done.err

    code, said = refused()
    assert code == 2 and "ROWMILL_BROKER_URL" in said
    there = {"ROWMILL_BROKER_URL": redis_url, "ROWMILL_DATABASE_URL": postgres_empty}
    assert refused("--engines", "fake", **there)[0] == 1
    assert "rowmill db upgrade" in refused("--engines", "fake", **there)[1]
    for value, said_of_it in (("nope", "there is no engine 'nope'"), (",", "names no engine")):
        code, said = refused("--engines", value, **there)
        assert code == 2 and said_of_it in said
    code, said = refused("--engines", "none", "--no-control", **there)
    assert code == 2 and "nothing to do" in said
    code, said = refused("--engines", "fake", "--setting", "broker_url=nonsense://x")
    assert code == 2 and "nonsense" in said
    gone = {**there, "ROWMILL_DATABASE_URL": "postgresql://postgres@127.0.0.1:9/none"}
    assert refused("--engines", "fake", **gone)[0] == 7


def test_it_does_not_wait_for_the_broker(
    rowmill: Rowmill,  # noqa: F811
    postgres_database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("pipeline.cli.admin.worker.become", lambda *arguments: started.append(arguments))
    there = {"ROWMILL_BROKER_URL": "redis://:secret@127.0.0.1:9/0", "ROWMILL_DATABASE_URL": postgres_database}
    done = Rowmill(rowmill.home, rowmill.environment | there).inside("worker", "start", "--engines", "fake")
    assert len(started) == 1
    assert "127.0.0.1:9" in done.err and "does not answer" in done.err and "secret" not in done.err


def test_what_is_said_of_a_dead_worker_and_of_one_in_trouble(
    rowmill: Rowmill,  # noqa: F811
    settings: Settings,
) -> None:
    runtime = start_runtime(settings, queues=["fake"], slots=1)
    mine, database = runtime.worker, runtime.database
    elsewhere = replace(mine, id="elsewhere:1:aaaa", host="elsewhere", lease_seconds=30.0)
    gone = replace(mine, id="gone:1:bbbb", start_ticks=1, pid_started_at=1.0)
    for worker in (mine, elsewhere, gone):
        workers.register(database, worker)
    with database.write() as connection:
        table = tables.worker
        connection.execute(table.update().where(table.c.id == elsewhere.id).values(heartbeat_at=now() - 100))
    here = Rowmill(rowmill.home, rowmill.environment | {"ROWMILL_DATA_DIR": str(settings.data_dir)})

    def said(*arguments: str) -> tuple[int, str]:
        done = here.inside("worker", *arguments)
        return done.code, done.out + done.err

    assert said("health") == (0, f"{mine.id}  alive\n")
    code, text = said("drain", elsewhere.id)
    assert code == 0 and "may be dead: it gave no sign of life for 1 min 40 s" in text
    code, text = said("drain", gone.id)
    assert code == 0 and "is dead, its process has ended" in text
    code, text = said("drain", gone.id, "--wait")
    assert code == 6 and "is dead" in text
    assert here.inside("worker", "drain", gone.id, "--json").document["dead"] == [gone.id]
    workers.touch(database, mine.id, trouble="1 of 2 shard threads have ended", dropped_messages=3)
    code, text = said("health")
    assert code == 1 and "no work can be had, 1 of 2 shard threads have ended" in text
    assert "dropped 3 malformed messages" in said("list")[1]
    workers.touch(database, mine.id)
    assert said("drain", mine.id) == (0, f"{mine.id}  is asked to drain\n")
    code, text = said("health")
    assert code == 0 and "takes no more work" in text
    health = here.inside("worker", "health", "--json").document
    assert (health["healthy"], health["gets_work"]) == (True, False)
    away = Rowmill(rowmill.home, here.environment | {"ROWMILL_DATABASE_URL": "postgresql://postgres@127.0.0.1:9/none"})
    done = away.inside("worker", "health")
    assert done.code == 0 and "no work can be had" in done.err
    runtime.close()


def test_without_workers(rowmill: Rowmill) -> None:  # noqa: F811
    assert rowmill.inside("worker", "list", "--json").document["workers"] == []
    assert rowmill.inside("worker", "health").code == 1
    assert rowmill.inside("worker", "drain", "nobody").code == 6
    assert rowmill.inside("worker", "drain").code == 2
    assert rowmill.inside("worker", "drain", "--all", "--json").document["draining"] == []
    assert json.loads(rowmill.inside("worker", "health", "--json").out)["healthy"] is False
