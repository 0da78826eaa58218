"""Fault 16, of schedules: several beats at the same due time, and beats that die between a fire and its job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from pipeline.process.runtime import start
from pipeline.worker import maintenance
from pipeline.worker.worker import Worker
from storage.queue import schedules
from storage.records import Fire
from storage.sql import tables
from storage.states import FireState, JobState
from tests.faults.driver import KILLED, Process, World, wait_until

ROUNDS = 5
NEW_YEARS = [datetime(datetime.now(UTC).year - n, 1, 1, 12, tzinfo=UTC).timestamp() for n in range(ROUNDS)]
"""The last times of the schedules here, the newest first. So far apart that no test can run into the next one."""


def add(world: World, name: str = "yearly", **options: Any) -> None:
    job = world.fields(output=str(world.home / "out" / "{schedule}-{fire_date:%Y}"))
    world.client.schedules.add(name, **{"cron": "0 12 1 1 *", "job": job} | options)


def come_due(world: World, at: float) -> None:
    """All schedules have come due since ``at``."""
    with world.database.write() as connection:
        connection.execute(tables.schedule.update().values(next_at=at))


def beats(world: World, count: int, tmp_path: Path, arm: dict[str, str] | None = None) -> list[Process]:
    """Processes that tick together each time a gate opens."""
    return [
        world.start("tick", {"gates": str(tmp_path / "gate"), "answers": str(tmp_path / f"beat-{n}")}, arm, {})
        for n in range(count)
    ]


def tick_together(tmp_path: Path, processes: Sequence[Process], number: int) -> list[str]:
    """Open a gate when all stand before it; the jobs that they say they have submitted."""
    for n, _ in enumerate(processes):
        wait_until((tmp_path / f"beat-{n}.{number}.ready").exists, "a beat before its gate")
    (tmp_path / f"gate.{number}").touch()
    submitted = []
    for n, process in enumerate(processes):

        def answered(path: Path = tmp_path / f"beat-{n}.{number}", process: Process = process) -> str:
            assert process.running(), process.err
            return path.read_text() if path.exists() else ""

        submitted += json.loads(wait_until(answered, "the end of a tick"))
    return submitted


def fires(world: World, name: str = "yearly") -> list[Fire]:
    return schedules.fires(world.database, world.client.schedules.get(name).id, limit=1000)


def test_16_two_beats_fire_each_time_once(world: World, tmp_path: Path) -> None:
    """Real processes tick at the same moment, over three schedules with three missed times each, again and again."""
    names = ["one", "two", "three"]
    for name in names:
        add(world, name, misfire="all", overlap="queue")
    processes = beats(world, 3, tmp_path)
    for number in range(ROUNDS):
        # Each round is over the same times, and begins from nothing.
        with world.database.write() as connection:
            connection.execute(tables.schedule_fire.delete())
            connection.execute(tables.job.delete())
        shutil.rmtree(world.home / "out", ignore_errors=True)  # it names its owner, a job that is gone
        come_due(world, NEW_YEARS[2])
        submitted = tick_together(tmp_path, processes, number)
        assert len(submitted) == len(set(submitted)) == len(names), "not one job a schedule"
        for name in names:
            found = fires(world, name)
            assert [fire.fire_at for fire in found] == NEW_YEARS[:3]
            assert [fire.state for fire in found] == [FireState.PENDING, FireState.PENDING, FireState.SUBMITTED]
        assert {job.id for job in world.rows("job")} == set(submitted)


def test_16_many_ticks_in_threads(world: World) -> None:
    """Eight ticks at once, over and over: each fire gets one job, and every job has its fire."""
    add(world)
    runtimes = [start(world.settings) for _ in range(8)]
    barrier = Barrier(len(runtimes))

    def tick(runtime: Any) -> list[str]:
        barrier.wait(60)
        return maintenance.run_maintenance(runtime)

    try:
        with ThreadPoolExecutor(len(runtimes)) as pool:
            for n in range(ROUNDS):
                come_due(world, NEW_YEARS[n])
                with world.database.write() as connection:
                    connection.execute(tables.schedule_fire.delete())
                    connection.execute(tables.job.delete())
                shutil.rmtree(world.home / "out", ignore_errors=True)  # it names its owner, a job that is gone
                submitted = [job for jobs in pool.map(tick, runtimes) for job in jobs]
                (fire,) = fires(world)
                assert submitted == [fire.job_id]
                assert [job.id for job in world.rows("job")] == submitted
                assert fire.missed == n
    finally:
        for runtime in runtimes:
            runtime.close()


@pytest.mark.parametrize(
    ("point", "incremental"), [("fire.decided", False), ("fire.inserted", True), ("fire.submitted", True)]
)
def test_16_a_beat_that_dies_between_a_fire_and_its_job(
    world: World, point: str, incremental: bool, tmp_path: Path
) -> None:
    """Whenever it is killed: the next beat leaves one fire with one job, whose output is whole."""
    add(world, incremental=incremental)
    come_due(world, NEW_YEARS[0])
    (dying,) = beats(world, 1, tmp_path, {point: "exit"})
    wait_until((tmp_path / "beat-0.0.ready").exists, "the beat")
    (tmp_path / "gate.0").touch()
    assert dying.join() == KILLED, dying.err
    (half,) = fires(world)
    there = point == "fire.submitted"
    assert half.state is (FireState.SUBMITTED if there else FireState.PENDING)
    assert len(world.rows("job")) == int(there)

    worker = Worker(world.settings)
    try:
        worker.tick()
        worker.tick()
        (fire,) = fires(world)
        assert fire.state is FireState.SUBMITTED
        (job,) = world.rows("job")
        assert job.id == fire.job_id

        def ended() -> bool:
            worker.plan()
            worker.run("fake")
            worker.finalize()
            return world.job(job.id).state is JobState.COMPLETED

        wait_until(ended, "the end of the job")
    finally:
        worker.close()
    assert world.job(job.id).rows_done == world.n_rows
    assert len(world.rows("schedule_file")) == int(incremental)
