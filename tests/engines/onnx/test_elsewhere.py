"""What one machine lacks, or a rival layout asks for, ends neither the job nor the engine in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import helper

from examples.tiny_encoder import build_encoder
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.engines.onnx.runtime import autotune, ort, session_pool
from pipeline.engines.onnx.runtime import run as onnx_run
from pipeline.engines.onnx.runtime.layout import Layout
from pipeline.engines.onnx.runtime.ort import GraphFile
from pipeline.engines.onnx.runtime.run import CancelScope, RunTimedOut, SessionRunner
from pipeline.execution.attempt import execute
from pipeline.jobs.plan import plan_job
from pipeline.jobs.submit import submit_job
from pipeline.process.heartbeat import LeaseKeeper
from pipeline.process.runtime import start
from storage.errors import EngineMissing, TransientError
from storage.queue import claims, jobs
from storage.states import JobState
from tests.engines.onnx.support import FLOAT, batches, engine, graph, job, run, value

SPEC = job("tensor")
NO_MEMORY = RuntimeError("Exception during initialization: std::bad_alloc")


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    return graph(tmp_path / "relu.onnx", nodes, [value("x", FLOAT, ["n"])], [value("y", FLOAT, ["n"])])


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> pa.RecordBatch:
    monkeypatch.setattr(autotune, "SAMPLE_SECONDS", 0.01)
    return pa.record_batch({"x": np.arange(300, dtype=np.float32) - 150})


def test_a_layout_that_memory_does_not_hold_is_out(
    relu: Path, rows: pa.RecordBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = session_pool.open_session
    monkeypatch.setattr(autotune, "available_cores", lambda: 2)

    def short(runtime: Any, file: GraphFile, options: Any, providers: Any, threads: int, **more: Any) -> Any:
        if threads > 1:
            raise TransientError("there is not the memory")
        return opened(runtime, file, options, providers, threads, **more)

    monkeypatch.setattr(session_pool, "open_session", short)
    made = engine(relu, SPEC, tmp_path)
    told = made.benchmark(SPEC, batches(rows, 20))
    made.close()
    assert told is not None
    assert all(" 1 threads" in trial["layout"] for trial in told["trials"])


def test_too_little_memory_is_no_fault_of_the_model(
    relu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(*_: Any, **__: Any) -> None:
        raise NO_MEMORY

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(TransientError, match="not the memory to load"):
        engine(relu, SPEC, tmp_path)


def test_a_provider_missing_on_one_worker_does_not_end_the_job_for_all(relu: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array([1.0, -1.0], pa.float32())}), tmp_path / "rows.parquet")
    fields = {
        "input": str(tmp_path / "rows.parquet"),
        "output": str(tmp_path / "out"),
        "model": str(relu),
        "task": "tensor",
        "engine_options": {"providers": ["CUDAExecutionProvider"]},
    }

    def attempt(name: str, **worker: Any) -> tuple[JobState, str]:
        broker = "redis://127.0.0.1:9/0" if worker else None
        settings = Settings(data_dir=tmp_path / name, cache_dir=tmp_path / "cache", broker_url=broker)
        runtime = start(settings, **worker)
        try:
            # Before any worker is known: its submit cannot tell that nobody has the provider.
            made = plan_job(runtime, submit_job(runtime, fields | {"output": str(tmp_path / f"{name}-out")}))
            runtime.register()
            with LeaseKeeper(runtime.database, worker_id=runtime.worker.id, lease_seconds=60.0) as keeper:
                claim = claims.claim(runtime.database, owner=runtime.worker.id, lease_seconds=60.0, job_id=made.id)
                assert claim is not None
                execute(runtime, claim, keeper, Cancellation(), others=bool(worker))
            left = jobs.get(runtime.database, made.id)
            return left.state, str(left.error)
        finally:
            runtime.close()

    assert attempt("fleet", queues=("onnx",))[0] is JobState.IN_PROGRESS
    with pytest.raises(EngineMissing, match="CUDAExecutionProvider"):
        attempt("embedded")


def test_rows_that_come_late_hold_nobody_up(relu: Path, tmp_path: Path) -> None:
    made = engine(relu, SPEC, tmp_path)
    columns = pa.record_batch({"x": pa.array([1.0], pa.float32())})
    asked, come = threading.Event(), threading.Event()

    def late() -> Iterator[Any]:
        asked.set()
        assert come.wait(30)
        yield from batches(columns)

    thread = threading.Thread(target=lambda: list(made.infer(SPEC, late(), Cancellation())))
    thread.start()
    assert asked.wait(30)
    assert len(list(made.infer(SPEC, batches(columns), Cancellation()))) == 1  # hangs, if the first holds the gate
    come.set()
    thread.join()
    made.close()


def test_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    assert ort.memory_left(tmp_path) > 0  # no limit here
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    assert ort.memory_left(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert ort.memory_left(tmp_path) > 1000


def test_gpus_are_named_as_the_driver_names_them(tmp_path: Path) -> None:
    for at, model in enumerate(("NVIDIA L4", "NVIDIA A2")):
        (tmp_path / str(at)).mkdir()
        (tmp_path / str(at) / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n")
    assert ort.gpu_names(tmp_path) == ["NVIDIA A2", "NVIDIA L4"]
    assert ort.gpu_names(tmp_path / "none") == []


def test_a_remembered_layout_opens_no_more_copies_than_memory_holds(
    relu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Layout(sessions=3, lanes=1, threads=1, token_budget=512, io_binding=False)
    monkeypatch.setattr(autotune, "read", lambda *_: kept)
    made = engine(relu, SPEC, tmp_path)
    assert made.stats()["sessions"] == 3
    made.close()
    monkeypatch.setattr(session_pool, "memory_left", lambda: 0)
    made = engine(relu, SPEC, tmp_path)
    stats = made.stats()
    made.close()
    assert stats["sessions"] == 1 and stats["layout_from"] == "cache"


def test_a_provider_that_this_runtime_has_not_is_told_when_it_may_be_missing(relu: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"], "allow_fallback": True}
    engine(relu, SPEC, tmp_path, said, **options).close()
    assert any("CUDAExecutionProvider does not work here" in message for message in said)


class LateRunner(SessionRunner):
    """Its kept buffers take longer than a run may."""

    def _kept(self, *_: Any) -> Any:
        raise RunTimedOut("the run took longer than row_timeout, 1 s")

    def _new(self, *_: Any) -> Any:
        raise AssertionError("run a second time")


def test_a_run_that_took_too_long_is_not_run_again(relu: Path) -> None:
    runtime = ort.import_runtime()
    session = runtime.InferenceSession(str(relu), providers=["CPUExecutionProvider"])
    lane = LateRunner(runtime, session, (RuntimeError,), binding=True)
    with pytest.raises(RunTimedOut):
        lane.run_one({"x": np.ones(1, np.float32)}, "y", (1,), CancelScope())
    assert lane.binding  # the buffers were not at fault


def test_loading_has_no_limit_of_seconds_and_lanes_share_the_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float | None] = []

    class Recorded(onnx_run.Deadline):
        def __init__(self, options: Any, seconds: float | None) -> None:
            limits.append(seconds)
            super().__init__(options, seconds)

    monkeypatch.setattr(onnx_run, "Deadline", Recorded)
    path = build_encoder(tmp_path / "encoder")
    made = engine(path, job("embed"), tmp_path, row_timeout=60.0, sessions=2, lanes=2, io_binding=True)
    assert limits and set(limits) == {None}
    run(made, job("embed"), pa.record_batch({"text": ["the"]}))
    assert made._loaded is not None
    shares = [runner._kept_bytes for runner in made._loaded.pool._runners]
    made.close()
    assert limits[-1] == 60.0
    assert len(shares) == 4 and sum(shares) <= onnx_run.KEPT_BYTES
