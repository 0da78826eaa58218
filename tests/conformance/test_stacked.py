"""Node tests whose inputs and outputs share their first axis, as rows: stacked, a row is what it is alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa

from pipeline.engines.base import Cancellation, EngineContext, RowBatch
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.runtime import low_precision
from pipeline.models.resolve import resolve
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidInput, InvalidJob, InvalidModel
from tests.conformance.cases import KINDS, Array, Case, cases, column, plain_run

COPIES = 3
"""A case with one row is stacked from so many copies of it."""


def with_a_dynamic_first_axis(case: Case) -> onnx.ModelProto | None:
    """The case's graph for any number of rows; ``None`` when its values do not share their first axis."""
    graph = case.model.graph
    sizes = set()
    for value in [*graph.input, *graph.output]:
        shape = value.type.tensor_type.shape
        if not value.type.tensor_type.HasField("shape") or not len(shape.dim):
            return None
        sizes.add(shape.dim[0].dim_value)
    if len(sizes) != 1 or 0 in sizes or not graph.input:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_param = "rows"
    del model.graph.value_info[:]  # the sizes of what lies between were those of the case
    return model


def alone(path: Path, rows: dict[str, Array], n: int) -> list[list[Array]] | None:
    """Outputs of plain ONNX Runtime for each row by itself; ``None`` where it refuses them, or gives another number."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        made = [plain_run(session, {name: array[i : i + 1] for name, array in rows.items()}) for i in range(n)]
    except Exception:  # its exceptions share no base
        return None
    if any(output.shape[:1] != (1,) for outputs in made for output in outputs):
        return None
    return made


def close(found: Array, expected: Array) -> bool:
    if expected.dtype.kind in "OUSb" or not low_precision.is_float(expected.dtype):
        return found.tolist() == expected.tolist()
    a, b = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    scale = float(np.abs(b[finite]).max(initial=0.0))
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True))


def outcome(case: Case, model: onnx.ModelProto, folder: Path) -> str:
    path = folder / "case.onnx"
    onnx.save(model, str(path))
    inputs = case.inputs or {}
    n = len(next(iter(inputs.values())))
    if n == 1:
        n, inputs = COPIES, {name: np.concatenate([array] * COPIES) for name, array in inputs.items()}
    how = KINDS[case.draw(len(KINDS))]
    spec = JobSpec(input=("rows.parquet",), output="out", model=str(path), task=Task.TENSOR)
    batch = pa.record_batch({name: column(rows, how) for name, rows in inputs.items()})
    expected = alone(path, inputs, n)
    try:
        resolved = resolve(str(path), folder)
        columns = OnnxEngine.check(spec, resolved, batch.schema)
        engine = OnnxEngine(resolved, spec.task, {"sessions": 1}, EngineContext(folder))
        try:
            engine.load()
            rows = RowBatch(np.arange(n), batch.select(list(columns)))
            results = list(engine.infer(spec, [rows], Cancellation()))
            stats = engine.stats()
        finally:
            engine.close()
    except (InvalidModel, InvalidJob, InvalidInput) as error:
        assert expected is None, f"plain ONNX Runtime runs every row, the engine says: {error}"
        return "refused"
    failures = [failure for result in results for failure in result.failures]
    if failures:
        assert expected is None, f"plain ONNX Runtime runs every row, the engine says: {failures[0]}"
        return "refused"
    if expected is None:
        return "only stacked"
    by_row: dict[int, dict[str, object]] = {}
    for result in results:
        assert result.values is not None
        for at, row in enumerate(result.rows.tolist()):
            by_row[row] = {name: result.values.column(name)[at].as_py() for name in case.outputs}
    assert sorted(by_row) == list(range(n))
    for row in range(n):
        for name, output in zip(case.outputs, expected[row], strict=True):
            got = by_row[row][name]
            values = got["data"] if isinstance(got, dict) else got
            found = np.asarray(values, dtype=object if output.dtype.kind in "OUS" else None).reshape(output.shape)
            assert close(found, output), f"row {row} of {n}, output {name}: {found} instead of {output}"
    return "stacked" if stats["stacked"] else "found to depend on each other"


def test_stacked_rows_are_what_they_are_alone(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    wrong = []
    for number, case in enumerate(cases()):
        model = with_a_dynamic_first_axis(case) if case.inputs is not None else None
        if model is None:
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            counts[outcome(case, model, folder)] += 1
        except Exception as error:  # one of hundreds: go on, and say all of them in the end
            wrong.append(f"{case.name}: {type(error).__name__}: {str(error)[:500]}")
    print(dict(counts))
    assert not wrong, f"{len(wrong)} of {counts.total()} cases:\n" + "\n".join(wrong)
