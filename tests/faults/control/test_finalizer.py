"""Fault 25: the finalizer is killed at every point of its way. Readers are never misled, and the next one ends it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.worker.worker import Worker
from storage import failpoints
from storage.errors import TransientError
from storage.objects.store import ObjectStore
from storage.queue import jobs
from storage.states import JobState
from tests.faults.driver import KILLED, World, wait_stopped, wait_until
from tests.faults.sabotage import work

POINTS = [
    "finalize.claimed@1", "finalize.part@1", "finalize.part@2", "finalize.manifest@1", "finalize.success@1",
    "finalize.complete@1",
]  # fmt: skip


def visible(world: World) -> tuple[int, bool, bool]:
    """What a reader sees: how many rows, whether a manifest, whether ``_SUCCESS``. Every file is whole."""
    files = sorted((world.output / "data").glob("*"))
    assert all(file.suffix == ".parquet" for file in files)
    rows = sum(pq.read_table(file, page_checksum_verification=True).num_rows for file in files)
    return rows, (world.output / "_manifest.json").exists(), (world.output / "_SUCCESS").exists()


SEEN = {
    "finalize.claimed@1": (0, False, False),
    "finalize.part@1": (100, False, False),
    "finalize.part@2": (200, False, False),
    "finalize.manifest@1": (200, False, False),
    "finalize.success@1": (200, True, False),
    "finalize.complete@1": (200, True, True),
}
"""What is published when the finalizer dies at each point."""


@pytest.mark.parametrize("point", POINTS)
def test_25_a_finalizer_is_killed(world: World, point: str) -> None:
    """Fault 25: killed anywhere between its claim and the job's end; what comes next publishes the same, once."""
    fields: dict[str, Any] = {"shard_rows": 111}
    name, _, hit = point.partition("@")
    assert world.run(arm={name: f"exit@{hit}"}, **fields).join() == KILLED
    [before] = world.client.jobs()
    assert before.state is JobState.FINALIZING
    assert visible(world) == SEEN[point]
    done = world.client.run(**world.fields(**fields))
    assert done.id == before.id
    assert visible(world) == (200, True, True)
    assert world.events(done.id, "finalize.claimed") == 2
    assert world.job(done.id).finalize_epoch == 2
    world.check(done.id)


def test_26_a_manifest_that_cannot_be_replaced_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 26: a store that says "it is there" whatever is deleted holds nobody up; once mended, the job ends."""
    put = ObjectStore.put_bytes

    def refuse(store: ObjectStore, uri: str, *content: Any, **how: Any) -> Any:
        if uri.endswith("_manifest.json"):
            raise FileExistsError(uri)
        return put(store, uri, *content, **how)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "put_bytes", refuse)
        with pytest.raises(TransientError, match=r"_manifest\.json is still there"):
            world.client.run(**world.fields(shard_rows=111))
    [before] = world.client.jobs()
    assert before.state is JobState.FINALIZING and "_manifest.json" in str(before.message)
    done = world.client.run(**world.fields(shard_rows=111))
    assert done.id == before.id
    world.check(done.id)


def test_25_a_finalizer_of_another_machine_is_waited_for(world: World) -> None:
    """Fault 25 for workers: nobody can see whether the finalizer is dead, so its lease decides."""
    job = world.submit(shard_rows=111)
    assert world.worker(arm={"finalize.manifest": "exit"}).join() == KILLED
    work(world, job)
    assert world.events(job, "finalize.claimed") == 2
    world.check(job)


@pytest.mark.parametrize(
    "point",
    ["finalize.publishing", "finalize.part@2", "finalize.manifest", "finalize.success", "finalize.complete"],
)
def test_25_a_finalizer_wakes_up_after_another_has_completed(world: World, point: str) -> None:
    """Fault 25 with a stop (found by chaos): what the late one deletes or replaces is published again."""
    world.replace_settings(lease_seconds=1.0)
    job = world.submit(shard_rows=111)
    name, _, hit = point.partition("@")
    late = world.worker(arm={name: f"stop@{hit}" if hit else "stop"})
    wait_stopped(late)
    work(world, job)
    assert visible(world) == (200, True, True)
    late.signal(signal.SIGCONT)
    wait_until(lambda: world.events(job, "finalize.touched"), "the report of the late finalizer")
    late.kill()
    other = Worker(world.settings)
    try:
        wait_until(
            lambda: (other.finalize(), not world.rows("job", id=job)[0].needs_republish)[1], "the end of the repair"
        )
    finally:
        other.close()
    assert visible(world) == (200, True, True)
    world.check(job)


def test_25_a_late_manifest_does_not_replace_its_successors(world: World) -> None:
    """Fault 25 with a stop between the last look at the lease and the put: that is a conditional one."""
    world.replace_settings(lease_seconds=1.0)
    job = world.submit(shard_rows=111)
    late = world.worker(arm={"finalize.put": "stop"})
    wait_stopped(late)
    work(world, job)
    manifest = world.output / "_manifest.json"
    before = manifest.stat()
    late.signal(signal.SIGCONT)
    wait_until(lambda: world.events(job, "finalize.touched"), "the report of the late finalizer")
    late.kill()
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    work(world, job)
    assert visible(world) == (200, True, True)


def test_25_a_manifest_that_a_late_finalizer_put_is_replaced(world: World) -> None:
    """Fault 25 the other way round: the late one was faster, and what it put is not what this one publishes."""
    job = world.submit(shard_rows=111)
    assert world.worker(arm={"finalize.claimed": "exit"}).join() == KILLED
    failpoints.arm("finalize.put", lambda: (world.output / "_manifest.json").write_text("{}"))
    try:
        work(world, job)
    finally:
        failpoints.disarm()
    world.check(job)


@pytest.mark.parametrize("point", ["finalize.manifest", "finalize.complete"])
def test_25_killed_while_a_partial_output_is_published(world: World, tmp_path: Path, point: str) -> None:
    """Fault 25 of a cancelled job: the partial output converges as well, and there is never a ``_SUCCESS``."""
    job = world.submit(shard_rows=111)
    assert world.worker(arm={"flush.recorded": "exit@3"}).join() == KILLED
    jobs.request_stop(world.database, job, "cancelled", actor="test")
    assert world.worker(arm={point: "exit"}).join() == KILLED
    assert world.job(job).state is JobState.CANCELLING
    work(world, job)
    assert world.job(job).state is JobState.CANCELLED
    assert visible(world) == (30, True, False)
    assert world.published().column("id").to_pylist() == list(range(30))
    assert json.loads((world.output / "_manifest.json").read_text())["partial"] is True
