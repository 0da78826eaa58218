"""A graph kept as it was optimized: equal results, made once, and given up where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pytest
from onnx import helper, numpy_helper

from pipeline.engines.onnx.runtime import graph_cache
from pipeline.engines.onnx.runtime.ort import KEPT_GRAPH, KEPT_WEIGHTS
from tests.engines.onnx.support import FLOAT, engine, graph, job, run, value, vectors

SPEC = job("tensor")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "LEAST_BYTES", 0)


def product(path: Path, width: int = 64, *, external: bool = False, seed: int = 0) -> Path:
    weights = np.random.default_rng(seed).normal(size=(width, width)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    inputs, outputs = [value("x", FLOAT, ["N", width])], [value("y", FLOAT, ["N", width])]
    graph(path, nodes, inputs, outputs, [numpy_helper.from_array(weights, "w")])
    if external:
        onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location=f"{path.stem}.data")
    return path


def rows(width: int = 64, n: int = 32) -> tuple[np.ndarray[Any, Any], pa.RecordBatch]:
    data = np.random.default_rng(7).normal(size=(n, width)).astype(np.float32)
    return data, pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(data.reshape(-1)), width)})


def plain(path: Path, data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": data})[0])


def result(path: Path, columns: pa.RecordBatch, cache: Path, **options: Any) -> tuple[np.ndarray[Any, Any], bool]:
    made = engine(path, SPEC, cache, **options)
    table, failures = run(made, SPEC, columns)
    kept = made.stats()["kept_graph"]
    made.close()
    assert not failures
    return vectors(table.column("y")), kept


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "onnx-optimized").glob("*") if path.is_dir())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("external", [False, True])
def test_a_kept_graph_gives_the_same_bits_and_is_made_once(tmp_path: Path, external: bool) -> None:
    path = product(tmp_path / "m" / "model.onnx", external=external)
    data, columns = rows()
    for _ in range(2):
        found, kept = result(path, columns, tmp_path / "cache")
        assert kept and found.tobytes() == plain(path, data).tobytes()
        (entry,) = entries(tmp_path / "cache")
    before = (entry / KEPT_GRAPH).stat()
    found, kept = result(path, columns, tmp_path / "cache")
    assert (entry / KEPT_GRAPH).stat().st_mtime_ns == before.st_mtime_ns
    found, kept = result(path, columns, tmp_path / "cache", keep_optimized=False)
    assert not kept and found.tobytes() == plain(path, data).tobytes()
    _, kept = result(path, columns, tmp_path / "cache", graph_optimization_level="basic")
    assert kept and len(entries(tmp_path / "cache")) == 2  # another graph


@pytest.mark.usefixtures("small")
def test_a_kept_graph_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    """Reading past the end of a mapped file would end the process."""
    path = product(tmp_path / "m" / "model.onnx")
    data, columns = rows()
    result(path, columns, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    os.truncate(entry / KEPT_WEIGHTS, 100)
    found, kept = result(path, columns, tmp_path / "cache")
    assert kept and found.tobytes() == plain(path, data).tobytes()
    assert (entry / KEPT_WEIGHTS).stat().st_size > 100


@pytest.mark.usefixtures("small")
def test_a_graph_is_run_as_it_is_where_none_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = product(tmp_path / "m" / "model.onnx")
    data, columns = rows()
    (tmp_path / "file").write_text("no folder")
    _, kept = result(path, columns, tmp_path / "file" / "cache", autotune=False)
    assert not kept
    usage = graph_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(graph_cache.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    found, kept = result(path, columns, tmp_path / "cache")
    assert not kept and found.tobytes() == plain(path, data).tobytes() and not entries(tmp_path / "cache")


@pytest.mark.usefixtures("small")
def test_other_weights_are_another_graph(tmp_path: Path) -> None:
    """The content counts, not the name."""
    data, columns = rows()
    for seed in (0, 1):
        path = product(tmp_path / str(seed) / "model.onnx", seed=seed)
        found, kept = result(path, columns, tmp_path / "cache")
        assert kept and found.tobytes() == plain(path, data).tobytes()
    assert len(entries(tmp_path / "cache")) == 2


MEMORY = """
import sys
from pathlib import Path
from tests.engines.onnx.support import engine, job
def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return int(fields["RssAnon"].split()[0]) * 1024
path, cache, keep = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "keep"
load = lambda: engine(path, job("tensor"), cache, sessions=1, lanes=1, keep_optimized=keep)
first = load()
before = anonymous()
others = [load() for _ in range(2)]
print(anonymous() - before)
"""


@pytest.mark.parametrize("external", [False, True])
def test_sessions_share_the_weights(tmp_path: Path, external: bool) -> None:
    width = 3072  # 36 MiB
    path = product(tmp_path / "m" / "model.onnx", width, external=external)
    own = {}
    for how in ("keep", "raw"):
        command = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "cache"), how]
        environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        own[how] = int(done.stdout) / 2
    weights = 4 * width**2
    assert own["keep"] < weights / 4
    assert own["raw"] > weights / 2  # each has a packed copy of its own


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.tmp"))
