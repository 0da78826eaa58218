"""Fault 24: a row that kills the engine, or its whole process, each time. It is found and failed; the rest is done."""

from __future__ import annotations

import gc
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines.base import ResultBatch
from pipeline.engines.fake.engine import FakeEngine
from pipeline.worker.worker import Worker
from storage import failpoints
from storage.sql import tables
from storage.states import TERMINAL_JOB, AttemptState, JobState
from tests.faults.conftest import make_settings
from tests.faults.driver import DEADLINE, KILLED, World, arm_all, wait_until
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


def test_24_the_rows_of_another_shard_on_the_same_engine_are_innocent(world: World) -> None:
    """Fault 24: two shards share the engine, each death ends both attempts. Only the row that kills it is failed."""
    options = {"die_on": "number 00003", "die_times": 10_000, "delay_ms_per_batch": 20}
    job = world.submit(shard_rows=100, engine_options=options)
    # As if the engine had died three times under both already: both are searched, at the same time.
    with world.database.write() as connection:
        connection.execute(tables.shard.update().where(tables.shard.c.job_id == job).values(n_crash=3))
    with_two_slots(world, job)
    check(world, job, {3})
    states: dict[str, Counter[AttemptState]] = defaultdict(Counter)
    for attempt in world.attempts(job):
        states[attempt.shard_id][attempt.state] += 1
    innocent, guilty = sorted(states.values(), key=lambda found: found[AttemptState.FAILED])
    assert innocent[AttemptState.FAILED] == 0 and guilty[AttemptState.FAILED] >= 2
    assert {shard.n_fail for shard in world.rows("shard", job_id=job)} == {0}


def test_24_a_search_that_is_interrupted_accuses_nobody(small_world: World) -> None:
    """Fault 24: rows that run alone while the worker drains have not killed anything."""
    world = small_world
    gate = world.home / "gate"
    # The third death begins the search; its first row alone waits at the gate.
    options = {"die_on": "text", "die_times": 3, "gate_file": str(gate)}
    job = world.submit(shard_rows=8, engine_options=options)
    gate.touch()
    worker = Worker(world.settings)

    def crashes() -> int:
        worker.run("fake")  # nothing, while the shard waits after a failure
        [shard] = world.rows("shard", job_id=job)
        return int(shard.n_crash)

    wait_until(lambda: crashes() == 3, "three deaths")
    gate.unlink()
    attempt = threading.Thread(target=worker.run, args=("fake",))
    attempt.start()
    wait_until(lambda: [a for a in world.rows("attempt") if a.state == "running" and a.alone], "a row alone")
    worker.flush()
    attempt.join()
    worker.close()
    [shard] = world.rows("shard", job_id=job)
    assert (shard.n_crash, shard.suspect) == (3, None)
    gate.touch()
    work(world, job)
    check(world, job, set())


def with_two_slots(world: World, job_id: str) -> None:
    """Be a worker with two slots until the job has ended."""
    worker = Worker(world.settings)

    def slot() -> None:
        while world.job(job_id).state not in TERMINAL_JOB:
            worker.run("fake")
            worker.finalize()

    slots = [threading.Thread(target=slot) for _ in range(2)]
    try:
        for each in slots:
            each.start()
        for each in slots:
            each.join(DEADLINE)
            assert not each.is_alive()
    finally:
        worker.close()


def test_24_what_a_failed_flush_leaves_in_the_engine_ends_with_the_attempt(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 24: the call of the engine is closed there and then, and not when the garbage is collected."""
    job = world.submit(engine_options={"delay_ms_per_batch": 1})
    closed: list[str] = []
    infer = FakeEngine.infer

    def watched(*args: Any) -> Iterator[ResultBatch]:
        try:
            yield from infer(*args)
        finally:
            closed.append(threading.current_thread().name)

    monkeypatch.setattr(FakeEngine, "infer", watched)
    worker = Worker(world.settings)
    gc.disable()
    try:
        arm_all({"flush.stored": "transient@2"})
        worker.run("fake")
        assert closed == [threading.current_thread().name]
        assert world.attempt_states(job) == [AttemptState.FAILED]
    finally:
        gc.enable()
        failpoints.disarm()
        worker.close()
