"""Fault 28: a process that dies again and again, whatever it is at, comes to an end, and no innocent row is blamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.states import AttemptState, JobState
from tests.faults.conftest import make_settings
from tests.faults.driver import KILLED, World
from tests.faults.sabotage import sabotaged, work

MAX_LOSSES = 2


@pytest.fixture
def small_world(tmp_path: Path, cache_dir: Path) -> Iterator[World]:
    """Eight rows in two shards, and two losses allowed."""
    database = f"sqlite:///{tmp_path / 'rowmill.db'}"
    settings = make_settings(tmp_path, cache_dir, database).model_copy(update={"max_losses": MAX_LOSSES})
    made = World(settings, tmp_path, n_rows=8)
    yield made
    made.close()


def run_to_the_end(world: World, where: str, most: int, shard_rows: int = 4) -> tuple[int, int]:
    """The same command again and again, until it ends by itself: (how often its process died, its exit code)."""
    for deaths in range(most + 1):
        code = sabotaged(world, {"die": [where]}, run=world.fields(shard_rows=shard_rows)).join()
        if code != KILLED:
            return deaths, code
    raise AssertionError(f"no end after {most} deaths")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("load", "while loading the engine"),
        ("result_schema", "while no row was in the engine"),
        ("before_any_row", "while no row was in the engine"),
        ("reading", "while no row was in the engine"),
    ],
)
def test_28_a_process_that_dies_before_its_rows_fails_the_job(small_world: World, where: str, words: str) -> None:
    """Each shard would meet the same end: the first one fails the job, and the message says where it died."""
    world = small_world
    deaths, code = run_to_the_end(world, where, MAX_LOSSES)
    assert (deaths, code) == (MAX_LOSSES, 0)
    [job] = world.client.jobs()
    assert job.state is JobState.FAILED
    assert f"died {words}" in str(job.error)
    assert "2 times in a row" in str(job.error)
    assert world.rows("row_exception") == []
    assert set(world.attempt_states(job.id)) == {AttemptState.LOST}


@pytest.mark.parametrize(("where", "publishing"), [("stats", 0), ("assembling", MAX_LOSSES)])
def test_28_a_process_that_dies_after_its_rows_keeps_them(small_world: World, where: str, publishing: int) -> None:
    """The rows are flushed, so the first death of each shard costs nothing. A partial output is assembled, too."""
    world = small_world
    expected = 2 * (MAX_LOSSES + 1) + publishing
    assert run_to_the_end(world, where, expected) == (expected, 0)
    [job] = world.client.jobs()
    assert job.state is JobState.FAILED
    words = "while publishing it" if publishing else "after the last row, while assembling the output"
    assert words in str(job.error)
    assert {row.code for row in world.rows("row_exception")} == {"missing_value"}
    assert sum(attempt.rows_computed for attempt in world.attempts(job.id)) == 8


def test_28_a_process_that_dies_while_publishing_ends_the_job(small_world: World) -> None:
    """All is computed; after the budget is spent the job says why it ended, and a retry publishes it."""
    world = small_world
    for _ in range(MAX_LOSSES):
        assert world.run(arm={"finalize.publishing": "exit"}).join() == KILLED
    assert world.run(arm={"finalize.publishing": "exit"}).join() == 0
    [job] = world.client.jobs()
    assert (job.state, job.rows_done) == (JobState.FAILED, 8)
    assert "died 2 times while publishing it" in str(job.error)
    world.client.job(job.id).retry()
    work(world, job.id)
    assert world.job(job.id).state is JobState.COMPLETED
    assert (world.output / "_SUCCESS").exists()


def test_28_what_was_computed_before_the_death_is_not_computed_again(small_world: World) -> None:
    """An engine that dies once all is computed is not asked again."""
    world = small_world
    assert run_to_the_end(world, "after_all_rows", 2) == (2, 0)
    [job] = world.client.jobs()
    assert job.state is JobState.COMPLETED
    assert {row.code for row in world.rows("row_exception")} == {"missing_value"}
    assert sum(attempt.rows_computed for attempt in world.attempts(job.id)) == 8


def test_28_an_engine_that_every_row_kills_comes_to_an_end(small_world: World) -> None:
    """Rows are convicted, and as none is computed in between, it is not them: the shard is given up."""
    world = small_world
    world.replace_settings(max_losses=3)
    # Three times with all rows, once with one row alone, and once with the others.
    assert run_to_the_end(world, "with_rows_inside", 5, shard_rows=8) == (5, 0)
    [job] = world.client.jobs()
    assert job.state is JobState.FAILED
    assert "while rows were in the engine" in str(job.error)
    assert [row.code for row in world.rows("row_exception")] == ["poison_row"]
