"""Every node test of the package ``onnx`` through the engine, from Parquet to result columns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation, EngineContext, RowBatch, RowFailure
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.models.resolve import resolve
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidInput, InvalidJob, InvalidModel
from storage.states import JobState
from tests.conformance.cases import KINDS, SHARE, Array, Case, Refused, all_cases, cases, plain, same_bits, write

JOBS = 96 // SHARE
"""Cases that are run as whole jobs."""

REFUSALS = (InvalidModel, InvalidJob, InvalidInput)


def outcome(case: Case, folder: Path) -> str:
    """What became of the case; raises for whatever is not one of the ways a case may end."""
    path = folder / "case.onnx"
    onnx.save(case.model, str(path))
    inputs = case.inputs or {}
    names = {name: f"column {name}" for name in inputs}
    spec = JobSpec(
        input=("rows.parquet",),
        output="out",
        model=str(path),
        task=Task.TENSOR,
        inputs=names,
        engine_options={"sessions": 1},
    )
    rows = {names[name]: array[None] for name, array in inputs.items()}
    if not inputs:
        rows = {"row": np.zeros(1)}
    table = write(folder / "rows.parquet", rows, KINDS[case.draw(len(KINDS))])
    try:
        expected: list[Array] | None = plain(case) if case.inputs is not None else None
    except Refused:
        expected = None
    try:
        model = resolve(str(path), folder)
        columns = OnnxEngine.check(spec, model, table.schema)
        engine = OnnxEngine(model, spec.task, spec.engine_options, EngineContext(folder))
        try:
            engine.load()
            batch = table.select(columns).to_batches()[0]
            results = list(engine.infer(spec, [RowBatch(np.zeros(1, np.int64), batch)], Cancellation()))
        finally:
            engine.close()
    except REFUSALS as error:
        assert expected is None, f"plain ONNX Runtime runs it, the engine says: {error}"
        return "job refused"
    failures: list[RowFailure] = [failure for result in results for failure in result.failures]
    if failures:
        assert expected is None, f"plain ONNX Runtime runs it, the engine says: {failures[0]}"
        assert len(failures) == 1 and failures[0].code == "engine_refused"
        return "row refused"
    assert expected is not None, "plain ONNX Runtime refuses it, the engine computed something"
    (result,) = results
    assert result.values is not None and result.rows.tolist() == [0]
    for name, array in zip(case.outputs, expected, strict=True):
        column = result.values.column(name)
        assert same_bits(column, 0, array), f"output {name} ({column.type}) differs: {column} instead of {array!r}"
    return "bit-equal"


def test_every_case_is_bit_equal_or_refused(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    wrong = []
    for number, case in enumerate(cases()):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            counts[outcome(case, folder)] += 1
        except Exception as error:  # one of a thousand: go on, and say all of them in the end
            wrong.append(f"{case.name}: {type(error).__name__}: {str(error)[:500]}")
    print(dict(counts))
    assert not wrong, f"{len(wrong)} of {number + 1} cases:\n" + "\n".join(wrong)
    # Plain ONNX Runtime 1.31 runs 1,489 of 1,884: a run in which most are refused proves nothing.
    assert counts["bit-equal"] > 0.7 * counts.total()


def test_cases_from_submission_to_output(settings: Settings, tmp_path: Path) -> None:
    """Some of the cases as jobs of their own, each row beside the columns that it came from."""
    done = 0
    with Client(settings=settings) as client:
        for case in sorted(all_cases(), key=lambda case: case.draw(2**32)):
            if not case.inputs:
                continue
            try:
                expected = plain(case)
            except Refused:
                continue
            folder = tmp_path / str(done)
            folder.mkdir()
            onnx.save(case.model, str(folder / "case.onnx"))
            names = {name: f"column {name}" for name in case.inputs}
            rows = {names[name]: np.stack([array] * 2) for name, array in case.inputs.items()}
            given = write(folder / "rows.parquet", rows, KINDS[case.draw(len(KINDS))])
            status = client.run(
                input=str(folder / "rows.parquet"),
                output=str(folder / "out"),
                model=str(folder / "case.onnx"),
                task="tensor",
                inputs=names,
            )
            assert (status.state, status.rows_done, status.rows_failed) == (JobState.COMPLETED, 2, 0), case.name
            table = pq.read_table(folder / "out" / "data").combine_chunks()
            assert table.select(given.column_names).equals(given)
            for name, array in zip(case.outputs, expected, strict=True):
                for row in range(2):
                    column = table.column(name).chunk(0)
                    assert same_bits(column, row, array), f"{case.name}, row {row}: {column[row]} instead of {array}"
            done += 1
            if done == JOBS:
                break
