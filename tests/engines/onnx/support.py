"""What the tests of the ONNX Runtime engine share: models as the resolver describes them, jobs, rows, graphs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import pyarrow as pa
from onnx import TensorProto, helper

from pipeline.engines.base import Cancellation, EngineContext, ResultBatch, RowBatch, RowFailure
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.runtime.graph_model import GraphModel
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec, Task

M = TypeVar("M", bound=GraphModel)


def model_at(path: Path, *, graphs: Sequence[str] = ()) -> Model:
    """A model as the resolver describes it; the digest is of the path and the weights' size, which is enough here."""
    folder = path if path.is_dir() else path.parent
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    graphs = graphs or [name for name in ("model.onnx", "onnx/model.onnx") if (path / name).is_file()]
    weights = [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]
    return Model(
        name=path.name,
        path=path,
        digest=hashlib.sha256(f"{path}{weights}".encode()).hexdigest(),
        architectures=tuple(config.get("architectures") or ()),
        config=config,
        onnx_files=tuple(path / name for name in graphs),
        content={file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()},
    )


def job(task: str, **fields: Any) -> JobSpec:
    if task != "tensor":
        fields.setdefault("column", "text")
    return JobSpec(input=("rows.parquet",), output="out", model="model", task=Task(task), **fields)


def engine(path: Path, spec: JobSpec, cache: Path, said: list[str] | None = None, **options: Any) -> OnnxEngine:
    made = OnnxEngine(
        model_at(path), spec.task, options, EngineContext(cache, (said if said is not None else []).append)
    )
    made.load()
    return made


def model_of(made: OnnxEngine, kind: type[M]) -> M:
    """What a loaded engine runs."""
    assert made._loaded is not None and isinstance(made._loaded.model, kind)
    return made._loaded.model


def batches(columns: pa.RecordBatch, size: int = 100, first: int = 0) -> Iterator[RowBatch]:
    """Row batches of ``size`` rows, whose ids count from ``first``."""
    for start in range(0, columns.num_rows, size):
        part = columns.slice(start, size)
        yield RowBatch(np.arange(start, start + part.num_rows, dtype=np.int64) + first, part)


def collect(results: Iterator[ResultBatch], n: int) -> tuple[pa.Table, dict[int, RowFailure]]:
    """Results by row; asserts that each of the rows 0…n-1 came exactly once. Failed rows are left out of the table."""
    values, rows, failures = [], [], {}
    for result in results:
        assert result.rows.dtype == np.int64
        assert (result.values.num_rows if result.values is not None else 0) == len(result.rows)
        rows += result.rows.tolist()
        if result.values is not None:
            values.append(result.values)
        for failure in result.failures:
            assert failure.row not in failures
            failures[failure.row] = failure
    assert sorted([*rows, *failures]) == list(range(n))
    if not values:
        return pa.table({}), failures
    return pa.Table.from_batches(values).take(np.argsort(rows)), failures


def run(
    made: OnnxEngine, spec: JobSpec, columns: pa.RecordBatch, size: int = 100
) -> tuple[pa.Table, dict[int, RowFailure]]:
    """Check, then infer everything."""
    table, failures = collect(made.infer(spec, batches(columns, size), Cancellation()), columns.num_rows)
    if table.num_columns:
        assert table.schema == made.result_schema(spec)
    return table, failures


FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
BOOL, STRING = TensorProto.BOOL, TensorProto.STRING


def value(name: str, kind: int, dims: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    opset: int = 18,
) -> Path:
    made = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(initializers))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def embeddings(table: pa.Table) -> np.ndarray[Any, Any]:
    column: Any = table.column("embedding").combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), -1)


def vectors(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """A column of ``fixed_size_list`` without nulls, [n, size]."""
    one: Any = column.combine_chunks()
    return np.asarray(one.flatten()).reshape(len(one), one.type.list_size)


def by_label(scores: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[float]:
    """A row's ``scores`` in the order of ``labels``; they must be best first, and name each of these once."""
    values = [pair["score"] for pair in scores]
    assert values == sorted(values, reverse=True)
    found = {pair["label"]: pair["score"] for pair in scores}
    assert len(scores) == len(labels) and found.keys() == set(labels)
    return [found[label] for label in labels]
