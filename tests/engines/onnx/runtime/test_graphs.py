"""The forms of a graph (kept as optimized, fused): equal results, made once, and given up where they cannot be had."""

from __future__ import annotations

import json
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

from examples.tiny_encoder import build_encoder
from pipeline.engines.onnx.runtime import graph_cache
from pipeline.engines.onnx.runtime.ort import KEPT_GRAPH, KEPT_WEIGHTS
from pipeline.models import fuse
from storage.errors import InvalidModel
from tests.engines.onnx.models.test_text import column, some_texts
from tests.engines.onnx.support import FLOAT, batches, embeddings, engine, graph, job, run, value, vectors

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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoder") / "tiny-encoder", normalize=True, pooling="mean")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def raw(encoder: Path, cache: Path) -> Path:
    """The graph of ``encoder``, as it was exported."""
    engine(encoder, job("embed"), cache, fused=False, autotune=False).close()
    return next((cache / "onnx").glob("*/model.onnx"))


class TestFused:
    def test_gives_what_the_raw_graph_gives(self, encoder: Path, cache: Path) -> None:
        texts = some_texts(80, seed=5)
        found = []
        for fused in (False, True):
            made = engine(encoder, job("embed"), cache, fused=fused, autotune=False)
            assert made.stats()["fused"] is fused
            table, failures = run(made, job("embed"), column(texts))
            made.close()
            assert not failures
            found.append(embeddings(table))
        assert np.abs(found[0] - found[1]).max() < 1e-5
        (report,) = (cache / "onnx-fused").glob(f"*/{fuse.REPORT}")
        said = json.loads(report.read_text())
        assert said["fused"]["SkipLayerNormalization"] >= 2 and said["drift"]["cosine_min"] > 0.9999
        stamp = report.stat().st_mtime_ns
        engine(encoder, job("embed"), cache, fused=True, autotune=False).close()
        assert report.stat().st_mtime_ns == stamp

    def test_is_among_what_is_measured(self, encoder: Path, cache: Path) -> None:
        made = engine(encoder, job("embed"), cache)
        rows = column(some_texts(60, seed=6))
        told = made.benchmark(job("embed"), batches(rows))
        made.close()
        assert told is not None
        assert {trial["layout"].rsplit(", ", 1)[1] for trial in told["trials"]} == {"raw graph", "fused graph"}

    def test_beyond_the_drift_limits_there_is_none(self, raw: Path, tmp_path: Path) -> None:
        changed = onnx.load(str(raw))
        for tensor in changed.graph.initializer:
            weights = numpy_helper.to_array(tensor)
            if weights.ndim == 2 and weights.dtype == np.float32:
                tensor.CopyFrom(numpy_helper.from_array(weights * np.float32(1.02), tensor.name))
        onnx.save(changed, str(tmp_path / "other.onnx"))
        said = {"vocabulary": 50, "longest": 20}
        assert not fuse.LIMITS.broken(fuse.compared(raw, raw, said))
        assert fuse.LIMITS.broken(fuse.compared(raw, tmp_path / "other.onnx", said))

    def test_one_that_is_refused_is_told_and_remembered(
        self, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refused = fuse.fused(product(tmp_path / "p.onnx"), "p", "1", {}, tmp_path)
        assert refused == (None, "the optimizer finds nothing to fuse in it")
        monkeypatch.setattr(fuse, "SECONDS", 0.0)
        assert fuse.fused(product(tmp_path / "p.onnx"), "p", "1", {}, tmp_path) == refused  # from the cache
        assert fuse.fused(raw, "q", "1", {}, tmp_path) == (
            None,
            "it could not be made: it was stopped, or took too long",
        )

    def test_a_graph_without_one_refuses_the_option(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidModel, match=r"fused: .* has no fused form: it is no transformer over texts"):
            engine(product(tmp_path / "p.onnx"), SPEC, tmp_path, fused=True)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.tmp"))
