"""Faults 1 to 7: processes that die, stop, are told to end, or come back from the dead.

Fault 3 (kill -9 of the process that an engine's processes belong to: they die, their memory is freed) needs an engine
that has processes: ``tests/engines/vllm/test_engine.py::test_kill_9_leaves_no_process`` does it to a real vLLM, and
``tests/host/test_child_reaper.py`` to what ends them. What the killed process was working on is fault 1.
"""

from __future__ import annotations

import json
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from storage.deaths import Step
from storage.errors import Unreachable
from storage.queue.reaper import Reaped
from storage.sql import database, tables
from storage.states import AttemptState, JobState, ShardState
from tests.faults.conftest import make_settings
from tests.faults.driver import KILLED, Process, World, wait_stopped, wait_until


def test_01_kill_9_of_a_worker(world: World) -> None:
    """Fault 1: kill -9 of a worker mid-shard. It is lost after its lease; the next attempt resumes from its parts."""
    job = world.submit()
    first = world.worker(arm={"flush.recorded": "stop@3"})
    wait_stopped(first)
    first.kill()
    world.worker()
    world.wait(job, JobState.COMPLETED)
    lost, winner = world.attempts(job)
    assert (lost.state, lost.rows_computed, lost.error) == (
        AttemptState.LOST,
        30,
        "its lease ran out while rows were in the engine",
    )
    assert (winner.state, winner.rows_resumed) == (AttemptState.SUCCEEDED, 30)
    world.check(job)


def test_01_what_users_start_dies(embedded_world: World) -> None:
    """Fault 1 once without what makes the other tests fast: no fork, and each write waits for the disk."""
    world = embedded_world
    world.fresh = True
    job = world.submit()
    assert world.worker(arm={"flush.recorded": "exit@3"}).join() == KILLED
    world.worker()
    world.wait(job, JobState.COMPLETED)
    assert [(attempt.state, attempt.rows_resumed) for attempt in world.attempts(job)] == [
        (AttemptState.LOST, 0),
        (AttemptState.SUCCEEDED, 30),
    ]
    world.check(job)


@pytest.mark.parametrize("point", ["flush.stored@2", "commit.assembled", "commit.done"])
def test_01_an_embedded_process_dies(world: World, point: str) -> None:
    """Fault 1, embedded: the process ends at once, at any point; the same command, run again, goes on from there.

    It does not wait for the lease (longer here than the test may take): it can see that the process is dead.
    """
    world.replace_settings(lease_seconds=600.0)
    name, _, hit = point.partition("@")
    assert world.run(arm={name: f"exit@{hit or 1}"}, shard_rows=100).join() == KILLED
    assert not world.output.joinpath("data").exists()
    second = world.run(shard_rows=100)
    assert second.join() == 0, second.err
    status = json.loads(second.out)
    attempts = world.attempts(status["id"])
    assert len(attempts) == (2 if name == "commit.done" else 3)
    if len(attempts) == 3:
        lost, winner = attempts[:2]
        flushed, step = (10, Step.COMPUTING) if name == "flush.stored" else (100, Step.FINISHING)
        assert (lost.state, lost.rows_computed, lost.error) == (
            AttemptState.LOST,
            flushed,
            f"its worker died {step.phrase}",
        )
        assert winner.rows_resumed == flushed
    world.check(status["id"])


def test_02_the_engine_dies(world: World) -> None:
    """Fault 2: the engine dies under a living worker. The attempt failed, a new engine is built, the shard is retried.

    ``tests/engines/vllm/test_engine.py::test_a_dead_engine_process`` kills the process of a real vLLM.
    """
    job = world.submit(engine_options={"die_on": "number 00050"})
    world.worker()
    world.wait(job, JobState.COMPLETED)
    failed, winner = world.attempts(job)
    assert failed.worker_id == winner.worker_id
    assert (failed.state, failed.rows_computed) == (AttemptState.FAILED, 50)
    assert failed.error is not None
    assert "killed the engine" in failed.error
    assert (winner.state, winner.rows_resumed, winner.rows_computed) == (AttemptState.SUCCEEDED, 50, 150)
    # Had the dead engine been used again, it would count the rows of both attempts.
    assert winner.stats["engine"]["rows"] == 150
    # It had flushed rows before it died, so the death costs the shard's budget nothing.
    assert [(shard.n_fail, shard.n_lost) for shard in world.shards(job)] == [(0, 0)]
    world.check(job)


def _released(world: World, process: Process, job: str) -> None:
    """SIGTERM the process, which waits in the engine after 25 rows; it ends, and hands back what it has done."""
    process.signal(signal.SIGTERM)
    assert process.join() == 0, process.err
    [attempt] = world.attempts(job)
    assert (attempt.state, attempt.rows_computed) == (AttemptState.RELEASED, 25)
    [shard] = world.shards(job)
    assert (shard.state, shard.n_done, shard.lease_owner) == (ShardState.READY, 25, None)
    assert (shard.n_fail, shard.n_lost, shard.n_crash) == (0, 0, 0)


def _resumed(world: World, job: str) -> None:
    world.wait(job, JobState.COMPLETED)
    released, winner = world.attempts(job)
    assert (released.state, winner.state) == (AttemptState.RELEASED, AttemptState.SUCCEEDED)
    assert winner.rows_resumed == 25
    world.check(job)


def test_04_sigterm(world: World, tmp_path: Path) -> None:
    """Fault 4: SIGTERM. What is finished is flushed, the shard is released, no budget is spent. See the next test."""
    gate = tmp_path / "gate"
    job = world.submit(engine_options={"gate_file": str(gate), "gate_after_rows": 25})
    first = world.worker()
    world.wait_for_flushes(job, 20)
    _released(world, first, job)
    gate.touch()
    world.worker()
    _resumed(world, job)


@pytest.mark.postgres
def test_04_sigterm_of_celery(broker_world: World, tmp_path: Path) -> None:
    """Fault 4 with a real Celery worker, which would rather wait until its running tasks have ended."""
    world = broker_world
    gate = tmp_path / "gate"
    job = world.submit(engine_options={"gate_file": str(gate), "gate_after_rows": 25})
    first, beat = world.celery("worker"), world.celery("beat")
    world.wait_for_flushes(job, 20)
    beat.end()
    _released(world, first, job)
    gate.touch()
    world.celery("worker")
    world.celery("beat")
    _resumed(world, job)


@pytest.mark.parametrize("point", ["flush.stored", "commit.assembled"])
def test_05_sigstop_past_the_lease(world: World, tmp_path: Path, point: str) -> None:
    """Fault 5: SIGSTOP past the lease, then CONT, while another attempt runs.

    The one that was stopped is about to record a flush, or to commit: it finds itself fenced, writes nothing, is noted
    as superseded, and its process goes on to serve.
    """
    gate = tmp_path / "commit"
    job = world.submit()
    first = world.worker(arm={point: "stop@1"})
    wait_stopped(first)
    second = world.worker(arm={"commit.assembled": f"wait:{gate}"})
    wait_until(Path(f"{gate}.reached").exists, "the second attempt's end")
    before = _written(world, job)
    assert world.attempt_states(job) == [AttemptState.LOST, AttemptState.RUNNING]
    first.signal(signal.SIGCONT)
    wait_until(lambda: AttemptState.SUPERSEDED in world.attempt_states(job), "the end of the first attempt")
    assert _written(world, job) == before
    gate.touch()
    world.wait(job, JobState.COMPLETED)
    stopped, winner = world.attempts(job)
    assert (stopped.state, winner.state) == (AttemptState.SUPERSEDED, AttemptState.SUCCEEDED)
    assert stopped.rows_computed == winner.rows_resumed == (0 if point == "flush.stored" else 200)
    assert world.events(job, "attempt.superseded") == 1
    world.check(job)
    assert second.end() == 0
    world.wait(world.submit(output=str(tmp_path / "another")), JobState.COMPLETED)
    assert first.end() == 0


@pytest.mark.postgres
def test_05_frozen_inside_a_transaction(
    postgres_database: str, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 5, the worst moment: a process stands still with its job's row locked. The server takes the lock back.

    On SQLite, whose lock is a file's, nobody writes until the process goes on or dies.
    """
    with closing(World(make_settings(tmp_path, cache_dir, postgres_database), tmp_path)) as world:
        job = world.submit()
        monkeypatch.setattr(database, "_IDLE_SECONDS", 1.0)
        frozen = database.Database(postgres_database)
        with pytest.raises(Unreachable), frozen.write() as connection:
            connection.execute(frozen.locked(sa.select(tables.job).where(tables.job.c.id == job)))
            world.worker()
            world.wait(job, JobState.COMPLETED)
            connection.execute(sa.select(1))
        frozen.close()
        world.check(job)


def _written(world: World, job: str) -> tuple[Any, ...]:
    """All that a fenced attempt might change. Not the lease, which the attempt that holds it renews meanwhile."""
    columns = ("state", "attempt_no", "lease_owner", "committed_attempt", "n_done", "done", "n_fail", "n_lost")
    return (
        [tuple(getattr(shard, name) for name in columns) for shard in world.shards(job)],
        [(part.attempt_no, part.seq) for part in world.rows("part_file")],
        [attempt.rows_computed for attempt in world.attempts(job)],
        world.job(job),
    )


def _zombie(world: World) -> tuple[str, Process]:
    """A job of two shards, and a process that stands still, past its lease, with the first one's commit before it."""
    job = world.submit(shard_rows=100)
    zombie = world.worker(arm={"commit.assembled": "stop@1"})
    wait_stopped(zombie)
    world.wait_for_lease_end(job)
    return job, zombie


@pytest.mark.parametrize("other", ["nobody", "committed"])
def test_06_a_zombie_commits_after_the_reaper(world: World, other: str) -> None:
    """Fault 6: a zombie commits after the reaper took its shard back, and perhaps after another attempt committed.

    Its commit is rolled back, the attempt superseded, its files collected in the end.
    """
    job, zombie = _zombie(world)
    first, _ = world.shards(job)
    if other == "committed":
        second = world.worker()
        world.wait(job, JobState.COMPLETED)
        assert second.end() == 0
        before = _written(world, job), _files(world.output)
    else:
        assert wait_until(lambda: world.reap().ready) == 1
    zombie.signal(signal.SIGCONT)
    wait_until(lambda: world.events(job, "attempt.superseded"), "the rolled back commit")
    if other == "nobody":
        assert world.attempts(job)[0].state is AttemptState.SUPERSEDED
    world.wait(job, JobState.COMPLETED)
    assert zombie.end() == 0
    if other == "committed":
        assert (_written(world, job), _files(world.output)) == before
    superseded, winner = [attempt for attempt in world.attempts(job) if attempt.shard_id == first.id]
    assert (superseded.state, superseded.rows_computed) == (AttemptState.SUPERSEDED, 100)
    assert (winner.state, winner.rows_computed, winner.rows_resumed) == (AttemptState.SUCCEEDED, 0, 100)
    assert [shard.committed_attempt for shard in world.shards(job)] == [2, 1]
    assert not (world.output / ".rowmill").exists()
    world.check(job)


def test_07_a_zombie_commits_before_the_reaper(world: World) -> None:
    """Fault 7: a zombie commits after its lease ran out, before any reaper came. Accepted, once."""
    job, zombie = _zombie(world)
    zombie.signal(signal.SIGCONT)
    world.wait(job, JobState.COMPLETED)
    assert world.reap() == Reaped(ready=0, failed=0)
    assert world.attempt_states(job) == [AttemptState.SUCCEEDED, AttemptState.SUCCEEDED]
    assert zombie.end() == 0
    world.check(job)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
