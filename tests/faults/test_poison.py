"""Fault 24: a row that kills the engine, or its whole process, each time. It is found and failed; the rest is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.states import AttemptState, JobState
from tests.faults.conftest import make_settings
from tests.faults.driver import KILLED, World
from tests.faults.sabotage import work


@pytest.fixture
def small_world(database_url: str, tmp_path: Path, cache_dir: Path) -> Iterator[World]:
    """Eight rows, so that few processes have to die before one row stands alone."""
    made = World(make_settings(tmp_path, cache_dir, database_url), tmp_path, n_rows=8)
    yield made
    made.close()


def check(world: World, job_id: str, poison: set[int]) -> None:
    """The job completed; the poison rows failed as such and every other row is what it would have been without them."""
    job = world.job(job_id)
    found, expected = world.published(), world.expected()
    errors = found.column("error").to_pylist()
    assert {n for n, error in enumerate(errors) if error and error["code"] == "poison_row"} == poison
    for name in expected.schema.names:
        pairs = zip(found.column(name).to_pylist(), expected.column(name).to_pylist(), strict=True)
        different = {n for n, (one, other) in enumerate(pairs) if one != other}
        assert different <= poison, f"column {name!r}"
    assert (job.state, job.rows_done, job.rows_failed) == (JobState.COMPLETED, world.n_rows, 1 + len(poison))
    assert sum(attempt.rows_computed for attempt in world.attempts(job_id)) == world.n_rows
    assert (world.output / "_SUCCESS").exists()


@pytest.mark.parametrize(("text", "poison"), [("number 00050", {50}), ("50", {50, 150})], ids=["one", "two"])
def test_24_rows_that_kill_the_engine(world: World, text: str, poison: set[int]) -> None:
    """Fault 24: the engine dies each time it meets the row; the worker lives and finds it."""
    job = world.submit(shard_rows=200, engine_options={"die_on": text, "die_times": 10_000})
    work(world, job)
    check(world, job, poison)
    assert set(world.attempt_states(job)) == {AttemptState.FAILED, AttemptState.SUCCEEDED}


def test_24_a_row_that_kills_the_process(small_world: World) -> None:
    """Fault 24: the whole process dies each time, and says nothing: no more than its losses lead to the row."""
    world = small_world
    fields = {"engine_options": {"crash_on": "number 00003"}}
    deaths = 0
    while (code := world.run(**fields).join()) == KILLED:
        deaths += 1
        assert deaths <= 8
    assert code == 0, world.processes[-1].err
    [job] = world.client.jobs()
    check(world, job.id, {3})
    states = world.attempt_states(job.id)
    assert states == [AttemptState.LOST] * deaths + [AttemptState.SUCCEEDED]
