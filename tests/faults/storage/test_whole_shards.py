"""Shards that are done within seconds: written from memory, without a part file, and durable with their commit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.settings import Settings
from pipeline.worker.worker import Worker
from storage.states import AttemptState, JobState
from tests.faults.conftest import make_settings
from tests.faults.driver import KILLED, World
from tests.faults.storage.test_commit import COMMIT, cable, through  # noqa: F401 - a fixture
from tests.faults.wire import Cut, Wire


def settings(home: Path, cache_dir: Path, database_url: str) -> Settings:
    """Those of the other fault tests, without ``flush_rows``."""
    given = make_settings(home, cache_dir, database_url)
    return Settings(**{name: getattr(given, name) for name in given.model_fields_set - {"flush_rows"}})


@pytest.fixture
def plain_world(database_url: str, tmp_path: Path, cache_dir: Path) -> Iterator[World]:
    made = World(settings(tmp_path, cache_dir, database_url), tmp_path)
    yield made
    made.close()


def part_files(world: World, job: str) -> list[int]:
    """How many part files each shard has, its output aside."""
    return [sum(part.seq >= 0 for part in world.rows("part_file", shard_id=shard.id)) for shard in world.shards(job)]


def run_to_the_end(world: World, job: str, **update: object) -> None:
    """Here, with a worker of this process."""
    worker = Worker(world.settings.model_copy(update=update))
    try:
        while world.job(job).n_open:
            worker.run("fake")
        worker.finalize()
    finally:
        worker.close()


def test_a_shard_that_is_done_at_once_needs_no_part_file(plain_world: World) -> None:
    """Rows, failed rows and tokens are counted by the commit, as flushes would have counted them."""
    world = plain_world
    job = world.submit(shard_rows=74)
    run_to_the_end(world, job)
    world.check(job)
    assert part_files(world, job) == [0] * len(world.shards(job))
    assert [(attempt.rows_resumed, attempt.rows_computed) for attempt in world.attempts(job)] == [
        (0, shard.row_n) for shard in world.shards(job)
    ]
    assert [error.row for error in world.client.job(job).errors()] == [7]
    assert [shard.n_failed for shard in world.shards(job)][:2] == [1, 0]


def test_killed_before_the_commit(plain_world: World) -> None:
    """Nothing of the shard was durable: it is computed once more, and then by resume points."""
    world = plain_world
    job = world.submit(shard_rows=200)
    assert world.worker(arm={"commit.assembled": "exit"}).join() == KILLED
    with world.worker():
        world.wait(job, JobState.COMPLETED)
    lost, again = world.attempts(job)
    assert (lost.state, lost.rows_computed) == (AttemptState.LOST, 0)
    assert (again.state, again.rows_resumed, again.rows_computed) == (AttemptState.SUCCEEDED, 0, 200)
    assert part_files(world, job) == [1]
    world.check(job)


def test_killed_after_the_commit(plain_world: World) -> None:
    world = plain_world
    job = world.submit(shard_rows=74)
    assert world.worker(arm={"commit.done": "exit@2"}).join() == KILLED
    with world.worker():
        world.wait(job, JobState.COMPLETED)
    assert world.attempt_states(job) == [AttemptState.SUCCEEDED] * len(world.shards(job))
    world.check(job)


@pytest.mark.postgres
@pytest.mark.parametrize("cut", list(Cut))
def test_a_broken_commit_counts_the_rows_once(
    postgres_database: str,
    tmp_path: Path,
    cache_dir: Path,
    cable: Wire,  # noqa: F811
    cut: Cut,
) -> None:
    world = World(settings(tmp_path, cache_dir, postgres_database), tmp_path)
    try:
        job = world.submit(shard_rows=74)
        cable.plan(cut, COMMIT)
        run_to_the_end(world, job, database_url=through(cable, postgres_database))
        assert cable.cuts == 1
        assert world.attempt_states(job) == [AttemptState.SUCCEEDED] * len(world.shards(job))
        assert part_files(world, job) == [0] * len(world.shards(job))
        world.check(job)
    finally:
        world.close()


def test_an_engine_that_breaks_after_its_last_answer_costs_no_row(plain_world: World) -> None:
    """What is whole in memory is flushed when the call does not end well."""
    world = plain_world
    job = world.submit(shard_rows=200, engine_options={"double_row": "text number 00199"})
    run_to_the_end(world, job)
    died, again = world.attempts(job)
    assert (died.state, died.rows_computed) == (AttemptState.FAILED, 200)
    assert (again.state, again.rows_resumed, again.rows_computed) == (AttemptState.SUCCEEDED, 200, 0)
    world.check(job)
