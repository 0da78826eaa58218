"""The contract of every engine, on ONNX Runtime, for each of its tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from onnx import helper

from examples.tiny_encoder import build_classifier, build_encoder
from pipeline.engines.base import Engine, EngineContext, RowBatch
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.testing import EngineContract, MakeBatch
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec
from tests.engines.onnx.support import FLOAT, engine, graph, job, model_at, value

SPECS = {
    "embed": job("embed"),
    "classify": job("classify"),
    "score": job("score", pair_column="other"),
    "tensor": job("tensor", inputs={"x": "numbers"}),
}


def _model(task: str, path: Path) -> Path:
    if task == "embed":
        return build_encoder(path)
    if task in ("classify", "score"):
        return build_classifier(path, labels=["a", "b", "c"] if task == "classify" else ["a"])
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]
    dims = ["n", 3]
    return graph(path / "model.onnx", nodes, [value("x", FLOAT, dims)], [value("y", FLOAT, dims)])


def _columns(first: int, n: int) -> pa.RecordBatch:
    rows = np.arange(first, first + n)
    numbers = np.stack([rows, rows + 1, rows % 7], axis=1).astype(np.float32) / 5
    return pa.record_batch(
        {
            "text": pa.array([f"number {row}" for row in rows], pa.string()),
            "other": pa.array([f"of {row % 11} rows" for row in rows], pa.string()),
            "numbers": pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), 3),
        }
    )


@pytest.fixture(scope="module", params=SPECS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(task, tmp_path_factory.mktemp("models") / task)


@pytest.fixture(scope="module")
def loaded(task: str, path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnnxEngine]:
    # Small windows: how far ahead rows are drawn shows with few of them.
    made = engine(path, SPECS[task], tmp_path_factory.mktemp("cache"), window_rows=4096)
    yield made
    made.close()


class TestOnnx(EngineContract):
    @pytest.fixture
    def engine(self, loaded: OnnxEngine) -> Engine:
        return loaded

    @pytest.fixture
    def model(self, path: Path) -> Model:
        return model_at(path)

    @pytest.fixture
    def unloaded(self, task: str, path: Path, tmp_path: Path) -> Engine:
        return OnnxEngine(model_at(path), SPECS[task].task, {}, EngineContext(tmp_path))

    @pytest.fixture
    def spec(self, task: str) -> JobSpec:
        return SPECS[task]

    @pytest.fixture
    def make_batch(self) -> MakeBatch:
        return lambda first, n: RowBatch(np.arange(first, first + n, dtype=np.int64), _columns(first, n))
