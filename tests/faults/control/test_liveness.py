"""Faults 26, 27 and 29: nothing stays stuck. Without the obstacle, the same command, or the next tick, completes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.jobs.submit import submit_job
from pipeline.process.runtime import start
from pipeline.worker import maintenance
from pipeline.worker.worker import Worker
from storage import failpoints, locations
from storage.errors import Conflict, InvalidInput, RowmillError
from storage.fleet import workers
from storage.sql import tables
from storage.states import AttemptState, JobState
from tests.faults.driver import KILLED, World, wait_until
from tests.faults.sabotage import work

MANY: dict[str, Any] = {"shard_rows": 50}
KINDS = ["parquet", "jsonl", "prefix", "jsonl in prefix order"]
HOUR = 3600.0


def fields(world: World, kind: str) -> dict[str, Any]:
    """A job over the world's rows that come in this way; it needs chunks of its own but for plain Parquet."""
    more = dict(MANY)
    if "prefix" in kind:
        more["order"] = "prefix"
    if "jsonl" in kind:
        folder = world.home / "lines"
        folder.mkdir(exist_ok=True)
        rows = pq.read_table(world.input).to_pylist()
        for name, part in (("a", rows[:120]), ("b", rows[120:])):
            if not (folder / f"{name}.jsonl").exists():
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        more["input"] = str(folder)
    return world.fields(**more)


def check(world: World, job: str, *, again: int = 0) -> None:
    """It is whole, and ``again`` rows were computed a second time; and the failed one, if a retry asked for it."""
    assert (world.output / "_SUCCESS").exists()
    rows = world.published()
    assert rows.column("id").to_pylist() == list(range(world.n_rows))
    assert [n for n, error in enumerate(rows.column("error").to_pylist()) if error is not None] == [7]
    failed = sum(shard.select is not None for shard in world.shards(job))
    assert sum(attempt.rows_computed for attempt in world.attempts(job)) == world.n_rows + again + failed


# 26: an obstacle where something is to be published, or kept.

OBSTACLES: dict[str, Callable[[Path], object]] = {
    "data": Path.touch,
    "_manifest.json": Path.mkdir,
    "_SUCCESS": Path.mkdir,
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_26_an_obstacle_to_publishing_embedded(embedded_world: World, name: str) -> None:
    world = embedded_world
    obstacle = world.output / name
    failpoints.arm("finalize.claimed", lambda: obstacle.exists() or OBSTACLES[name](obstacle))
    try:
        with pytest.raises((RowmillError, OSError)):
            world.client.run(**world.fields(**MANY))
    finally:
        failpoints.disarm()
    [before] = world.client.jobs()
    assert before.state is JobState.FINALIZING
    assert "could not be published yet" in (before.message or "")
    obstacle.unlink() if obstacle.is_file() else obstacle.rmdir()
    assert world.client.run(**world.fields(**MANY)).id == before.id
    world.check(before.id)


def test_26_an_obstacle_to_publishing_in_a_fleet(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It holds up no other job; the job says what is in the way, and is tried again within one lease."""
    job = world.submit(**MANY)
    obstacle = world.output / "data"
    worker = Worker(world.settings)
    try:
        while world.job(job).n_open:
            worker.run("fake")
        obstacle.touch()
        other = submit_job(
            world.client._runtime, world.fields(output=str(world.home / "other"), shard_rows=200), plan=True
        )
        worker.run("fake")
        worker.finalize()  # the older one first
        worker.finalize()
        assert world.job(other.id).state is JobState.COMPLETED
        status = world.client.job(job).status()
        assert status.state is JobState.FINALIZING
        assert str(obstacle) in (status.message or "")
        (said,) = [vars(r) for r in caplog.records if vars(r).get("action") == "job.publishing_postponed"]
        assert (said["job_id"], said["tenant"], said["worker"]) == (job, "default", worker.runtime.worker.id)
        assert workers.holders(world.database, job) == []
    finally:
        worker.close()
    obstacle.unlink()
    work(world, job)
    world.check(job)


@pytest.mark.parametrize(
    "point", ["finalize.part@2", "finalize.manifest@1", "finalize.success@1", "finalize.complete@1"]
)
def test_26_no_space_while_publishing(embedded_world: World, point: str) -> None:
    """Fault 26 in a process of its own, which ends with the error."""
    world = embedded_world
    name, _, hit = point.partition("@")
    process = world.run(arm={name: f"disk_full@{hit}"}, **MANY)
    assert process.join() not in (0, KILLED)
    [before] = world.client.jobs()
    done = world.client.run(**world.fields(**MANY))
    assert done.id == before.id
    world.check(done.id)


@pytest.mark.parametrize("point", ["plan.prepared", "plan.sampled", "plan.spilled", "plan.chunk@2"])
def test_26_no_space_while_planning(embedded_world: World, point: str) -> None:
    world = embedded_world
    job = fields(world, "jsonl in prefix order")
    name, _, hit = point.partition("@")
    process = world.start("run", job, {name: f"disk_full@{hit}" if hit else "disk_full"}, {})
    assert process.join() not in (0, KILLED)
    check(world, world.client.run(**job).id)


# 27: killed, then cancelled, at any point: a retry completes it, if the cancel has not.

KILLS = [
    "claim.taken@1",
    "flush.recorded@3",
    "commit.assembled@2",
    "commit.done@4",
    "finalize.claimed@1",
    "finalize.part@1",
]


@pytest.mark.parametrize(
    ("point", "kind"), [*((point, KINDS[-1]) for point in KILLS), *((KILLS[1], kind) for kind in KINDS[:-1])]
)
def test_27_killed_then_cancelled(embedded_world: World, kind: str, point: str) -> None:
    world = embedded_world
    job = fields(world, kind)
    name, _, hit = point.partition("@")
    assert world.start("run", job, {name: f"exit@{hit}"}, {}).join() == KILLED
    [before] = world.client.jobs()
    handle = world.client.job(before.id)
    cancelled = handle.cancel()
    everything = all(shard.state == "committed" for shard in world.shards(before.id))
    assert cancelled.state is (JobState.COMPLETED if everything else JobState.CANCELLED)
    if not everything:
        assert not (world.output / "_SUCCESS").exists()
        handle.retry()
    assert handle.wait(timeout=60).state is JobState.COMPLETED
    check(world, before.id)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_27_a_retry_after_the_retention(embedded_world: World, kind: str) -> None:
    """The work folder was deleted: what was made of the input is made again. A file that is new is not read."""
    world = embedded_world
    world.replace_settings(attempt_retention_hours=0.0)
    job = fields(world, kind)
    assert world.start("run", job, {"commit.done": "exit@2"}, {}).join() == KILLED
    [before] = world.client.jobs()
    handle = world.client.job(before.id)
    handle.cancel()
    assert maintenance.collect_garbage(world.client._runtime) == 1
    assert world.client._runtime.store.list_tree(locations.work_dir(str(world.output), before.id)) == []
    if "jsonl" in kind:
        (world.home / "lines" / "aa.jsonl").write_text('{"id": 1000, "text": "new", "tag": 0}\n')
    handle.retry()
    assert handle.wait(timeout=60).state is JobState.COMPLETED
    # Two shards were committed. Their rows were published with the partial output, but merged with others there.
    check(
        world,
        before.id,
        again=sum(shard.row_n for shard in world.shards(before.id) if shard.gen) if "prefix" in kind else 0,
    )


def test_27_an_input_that_was_changed_is_named(embedded_world: World) -> None:
    """The job cannot go on, and says why; what it had published stays."""
    world = embedded_world
    world.replace_settings(attempt_retention_hours=0.0)
    job = fields(world, "jsonl")
    assert world.start("run", job, {"commit.done": "exit@2"}, {}).join() == KILLED
    [before] = world.client.jobs()
    handle = world.client.job(before.id)
    handle.cancel()
    maintenance.collect_garbage(world.client._runtime)
    published = world.published()
    other = world.home / "lines" / "b.jsonl"
    text = other.read_text()
    other.write_text(text.replace("text number", "another text"))
    handle.retry()
    with pytest.raises(InvalidInput, match="gone, or was changed"):
        handle.wait(timeout=60)
    status = handle.status()
    assert (status.state, "was changed" in (status.error or "")) == (JobState.FAILED, True)
    assert world.published().equals(published)


def test_27_cancelled_before_it_was_planned(embedded_world: World) -> None:
    world = embedded_world
    job = submit_job(world.client._runtime, world.fields(**MANY))
    handle = world.client.job(job.id)
    assert handle.cancel().state is JobState.CANCELLED
    assert handle.retry().state is JobState.VALIDATING
    assert handle.wait(timeout=60).state is JobState.COMPLETED
    world.check(job.id)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_27_a_retry_in_a_fleet(world: World, kind: str) -> None:
    """The client need not reach the input: a worker makes again what is gone."""
    runtime = world.client._runtime
    job = submit_job(runtime, fields(world, kind)).id
    assert world.worker(arm={"claim.taken": "exit@1"}).join() == KILLED
    handle = world.client.job(job)
    world.wait_for_lease_end(job)
    world.reap()
    assert handle.cancel().state is JobState.CANCELLED
    assert runtime.store.list_tree(locations.work_dir(str(world.output), job)) == []
    assert handle.retry().state is (JobState.QUEUED if kind == "parquet" else JobState.VALIDATING)
    with world.worker():
        world.wait(job, JobState.COMPLETED)
    check(world, job)


# Leases of those who are no more, and times of a clock that was wrong (29).


def move(world: World, **values: Any) -> None:
    """Change every worker's row, as if it had registered so."""
    with world.database.write() as connection:
        connection.execute(tables.worker.update().values(**values))


def set_back(world: World) -> None:
    """As if the database's clock had been an hour ahead until now."""
    with world.database.write() as connection:
        for column in (
            tables.shard.c.run_after,
            tables.shard.c.lease_until,
            tables.job.c.finalize_until,
            tables.worker.c.heartbeat_at,
        ):
            connection.execute(column.table.update().values({column.name: column + HOUR}))


@pytest.mark.parametrize(
    ("host", "back"), [("here", False), ("elsewhere", True)], ids=["here", "elsewhere, clock set back"]
)
@pytest.mark.parametrize("point", ["plan.chunk@1", "flush.recorded@2", "finalize.part@1"])
def test_29_the_lease_of_a_dead_process(world: World, point: str, host: str, back: bool) -> None:
    """Of this host it is known to be dead; of another (a container with a new name) its lease decides."""
    # Long enough that it has not run out before it is looked at.
    world.replace_settings(lease_seconds=4.0)
    name, _, hit = point.partition("@")
    job = fields(world, "prefix" if name.startswith("plan") else "parquet")
    assert world.start("run", job, {name: f"exit@{hit}"}, {}).join() == KILLED
    [before] = world.client.jobs()
    if host != "here":
        move(world, host="elsewhere")
    if back:
        set_back(world)
    told: list[str] = []
    done = world.client.run(**job, on_notice=told.append)
    assert (done.id, done.state) == (before.id, JobState.COMPLETED)
    if host != "here":
        assert any("unless it renews its lease" in message for message in told)
    check(world, done.id)


def test_a_live_process_is_not_overtaken(embedded_world: World) -> None:
    """Of this host, or of another one where it renews its lease."""
    world = embedded_world
    gate = world.home / "gate"
    options = {"gate_file": str(gate)}
    process = world.run(engine_options=options, **MANY)
    job = wait_until(world.client.jobs, "the job")[0].id
    world.wait(job, JobState.IN_PROGRESS)
    for host in (None, "elsewhere"):
        if host is not None:
            move(world, host=host)
        with pytest.raises(Conflict, match="being worked on by another process"):
            world.client.run(**world.fields(engine_options=options, **MANY))
    gate.touch()
    assert process.join() == 0
    assert world.attempt_states(job) == [AttemptState.SUCCEEDED] * 4


def test_a_process_is_registered_while_any_of_its_jobs_runs(embedded_world: World) -> None:
    world = embedded_world
    runtime = start(world.settings)
    try:
        with runtime.registered():
            with runtime.registered():
                pass
            assert [seen.worker.id for seen in workers.listed(world.database)] == [runtime.worker.id]
            workers.unregister(world.database, runtime.worker.id)  # struck off after a long silence
            runtime.heartbeat()
            assert len(workers.listed(world.database)) == 1
        assert workers.listed(world.database) == []
    finally:
        runtime.close()
