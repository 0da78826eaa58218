"""What a job is said to be at, by the process that runs it and by another one that watches."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.fake.engine import FakeEngine
from pipeline.spec.status import JobStatus, Phase
from storage import failpoints
from storage.states import JobState
from tests.faults.driver import wait_until


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, object]:
    pq.write_table(pa.table({"text": [f"t{n}" for n in range(40)]}), tmp_path / "in.parquet")
    base = {"input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out"), "model": "fake", "prompt": "{text}"}
    return {**base, "task": "generate"}


def test_others_see_that_the_engine_is_loaded_and_then_that_rows_are_computed(
    settings: Settings,
    database_url: str,
    fields: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads, gate = threading.Event(), tmp_path / "gate"
    monkeypatch.setattr(FakeEngine, "load", lambda self: loads.wait(60))
    shared = settings.model_copy(update={"database_url": database_url})
    with Client(settings=shared) as client, Client(settings=shared) as watching:
        job = client.submit(**fields, engine_options={"gate_file": str(gate)})
        other = watching.job(job.id)
        wait_until(lambda: other.status().phase is Phase.LOADING, "others see that the engine is loaded")
        first = other.status().phase_seconds
        assert first is not None
        wait_until(lambda: (other.status().phase_seconds or 0) > first, "time passes")
        assert other.status().to_json()["phase"] == "loading the engine"
        loads.set()
        wait_until(lambda: other.status().phase is Phase.COMPUTING, "others see that rows are computed")
        assert other.status().phase_seconds is None
        gate.touch()
        ended = job.wait(timeout=60)
        assert (ended.phase, ended.phase_seconds) == (None, None)


def test_the_other_phases(settings: Settings, fields: dict[str, object]) -> None:
    seen: list[JobStatus] = []
    with Client(settings=settings) as client:
        waiting = client.submit(start=False, **fields).status()
        assert (waiting.state, waiting.phase) == (JobState.QUEUED, Phase.WAITING)

        def look() -> None:
            seen.append(client.job(waiting.id).status())

        failpoints.arm("finalize.manifest", look)
        try:
            client.job(waiting.id).resume(on_progress=seen.append)
        finally:
            failpoints.disarm()
    assert Phase.PUBLISHING in {status.phase for status in seen}
    assert seen[-1].phase is None


def test_a_shard_that_failed_waits_to_be_tried_again(settings: Settings, fields: dict[str, object]) -> None:
    options = {"transient_on": "t7", "transient_times": 1}
    with Client(settings=settings) as client:
        job = client.submit(**fields, engine_options=options)
        wait_until(lambda: job.status().phase in (Phase.RETRYING, None), "it failed once")
        assert job.status().failures == 1
        assert job.wait(timeout=60).state is JobState.COMPLETED


def test_what_one_job_has_not_flushed_is_not_counted_for_another(settings: Settings, fields: dict[str, object]) -> None:
    from pipeline.worker.embedded import with_unflushed

    with Client(settings=settings) as client:
        job = client.submit(start=False, **fields)
        client._runtime.unflushed.update({"another-job.00.0000000": 5, f"{job.id}.00.0000000": 7})
        assert with_unflushed(client._runtime, job.status()).rows_done == 7
