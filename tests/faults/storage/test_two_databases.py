"""Fault 34: two databases and one output. What each step does in between is in ``tests/output/test_owner.py``."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from pipeline import Client
from storage.errors import Conflict
from storage.states import JobState
from tests.faults.driver import KILLED, World, wait_stopped


@pytest.fixture
def theirs(world: World) -> Iterator[Client]:
    """Of another database, which is SQLite's in both cases."""
    update = {"data_dir": world.home / "theirs", "database_url": None}
    with Client(settings=world.settings.model_copy(update=update)) as client:
        yield client


def test_34_a_killed_job_keeps_its_output(world: World, theirs: Client) -> None:
    assert world.run(arm={"flush.recorded": "exit@2"}).join() == KILLED
    [killed] = world.client.jobs()
    with pytest.raises(Conflict, match=f"{world.output} belongs to job {killed.id} of another database"):
        theirs.run(**world.fields(prompt="Other: {text}"))
    assert theirs.jobs() == []
    assert world.client.run(**world.fields()).id == killed.id
    world.check(killed.id)


def test_34_a_finalizer_that_was_stopped_lets_the_output_be(world: World, theirs: Client) -> None:
    """It wakes up when another database's job has been told to take the output, and has published there."""
    process = world.run(arm={"finalize.manifest": "stop"}, shard_rows=111)
    wait_stopped(process)
    other = theirs.run(**world.fields(prompt="Other: {text}", overwrite=True))
    before = world.published()
    process.signal(signal.SIGCONT)
    process.join()
    [late] = world.client.jobs()
    assert (late.state, other.state) == (JobState.FAILED, JobState.COMPLETED)
    assert other.id in str(late.error)
    assert world.published().equals(before)
    assert all("Other" in text for text in before.column("output").to_pylist() if text)
    assert (world.output / "_SUCCESS").exists()
