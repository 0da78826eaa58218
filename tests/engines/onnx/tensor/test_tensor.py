from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

from pipeline.engines.base import Cancellation, EngineContext
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.runtime import low_precision, session_pool
from pipeline.engines.onnx.runtime.run import CancelScope
from pipeline.models import int8_overflow
from pipeline.models.resolve import resolve
from storage.errors import EngineDead, InvalidInput, InvalidJob, InvalidModel
from tests.engines.onnx.support import (
    BOOL,
    FLOAT,
    INT64,
    STRING,
    batches,
    engine,
    graph,
    job,
    model_at,
    run,
    value,
    vectors,
)

SPEC = job("tensor")


@pytest.fixture
def two_by_two(tmp_path: Path) -> Path:
    """a [N, L, 3] and b [N, L, 3] → sum [N, L, 3] and total [N, 3]: two inputs, two outputs, a dynamic axis."""
    axes = helper.make_tensor("axes", INT64, [1], [1])
    return graph(
        tmp_path / "two.onnx",
        [
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("ReduceSum", ["sum", "axes"], ["total"], keepdims=0),
        ],
        [value("a", FLOAT, ["N", "L", 3]), value("b", FLOAT, ["N", "L", 3])],
        [value("sum", FLOAT, ["N", "L", 3]), value("total", FLOAT, ["N", 3])],
        [axes],
    )


def identity(path: Path, kind: int, dims: list[Any], out: list[Any] | None = None) -> Path:
    return graph(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [value("x", kind, dims)],
        [value("y", kind, dims if out is None else out)],
    )


def rows_of(column: pa.ChunkedArray) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(row, dtype=np.float32) for row in column.to_pylist()]


def test_two_inputs_two_outputs_and_a_dynamic_axis(two_by_two: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 5, 200)
    a = [rng.normal(size=(n, 3)).astype(np.float32) for n in lengths]
    b = [rng.normal(size=(n, 3)).astype(np.float32) for n in lengths]
    kind = pa.list_(pa.list_(pa.float32(), 3))
    columns = pa.record_batch(
        {"a": pa.array([x.tolist() for x in a], kind), "bee": pa.array([x.tolist() for x in b], kind)}
    )
    spec = job("tensor", inputs={"b": "bee"})
    assert OnnxEngine.check(spec, model_at(two_by_two), columns.schema) == ("a", "bee")
    made = engine(two_by_two, spec, tmp_path)
    table, failures = run(made, spec, columns, size=64)
    stats = made.stats()
    made.close()
    assert not failures
    assert table.schema.field("sum").type == pa.list_(pa.list_(pa.float32()))
    assert table.schema.field("total").type == pa.list_(pa.float32(), 3)
    session = onnxruntime.InferenceSession(str(two_by_two), providers=["CPUExecutionProvider"])
    totals = rows_of(table.column("total"))
    for row, found in enumerate(table.column("sum").to_pylist()):
        expected, total = session.run(None, {"a": a[row][None], "b": b[row][None]})
        assert np.array_equal(np.asarray(found, np.float32).reshape(-1, 3), expected[0])
        assert np.allclose(totals[row], total[0], atol=1e-6)
    assert stats["row_mode"] == "stack" and stats["stacked"]
    assert stats["runs"] - stats["compared_rows"] < 40  # five lengths, in each of four batches
    pq.write_table(table, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(table)


@pytest.mark.parametrize(
    ("kind", "target", "data"),
    [
        (pa.float32(), FLOAT, [1.5, 2.5, -3.0]),
        (pa.float16(), FLOAT, [1.5, 2.5, -3.0]),
        (pa.int8(), FLOAT, [1, 2, 3]),
        (pa.int32(), INT64, [1, -2, 3]),
        (pa.uint16(), INT64, [1, 65535, 3]),
        (pa.bool_(), BOOL, [True, False, True]),
        (pa.string(), STRING, ["a", "", "ü"]),
        (pa.large_string(), STRING, ["a", "", "ü"]),
        (pa.dictionary(pa.int8(), pa.string()), STRING, ["a", "", "a"]),
    ],
    ids=str,
)
def test_scalars_of_every_type_and_lossless_casts(tmp_path: Path, kind: Any, target: int, data: list[Any]) -> None:
    path = identity(tmp_path / "scalar.onnx", target, ["N"])
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    array = pa.array([data[0], *data, None, data[1]], plain).cast(kind)
    columns = pa.record_batch({"x": array}).slice(1)
    assert OnnxEngine.check(SPEC, model_at(path), columns.schema) == ("x",)
    made = engine(path, SPEC, tmp_path)
    table, failures = run(made, SPEC, columns)
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == {3: "missing_value"}
    assert table.column("y").to_pylist() == [*data, data[1]]


TENSORS = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


def fixed_shape_tensors() -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(TENSORS)


def permuted_tensors() -> pa.Array:
    """Stored as [3, 2], read as [2, 3]."""
    kind = pa.fixed_shape_tensor(pa.float32(), [3, 2], permutation=[1, 0])
    stored = np.ascontiguousarray(TENSORS.transpose(0, 2, 1))
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), 6))


def shaped_structs() -> pa.Array:
    return pa.array(
        [{"shape": [2, 3], "data": row.reshape(-1).tolist()} for row in TENSORS],
        pa.struct([pa.field("shape", pa.list_(pa.int32())), pa.field("data", pa.list_(pa.float32()))]),
    )


def nested(kind: pa.DataType) -> pa.Array:
    return pa.array(TENSORS.tolist(), kind)


@pytest.mark.parametrize(
    "column",
    [
        fixed_shape_tensors(),
        permuted_tensors(),
        shaped_structs(),
        nested(pa.list_(pa.list_(pa.float32(), 3), 2)),
        nested(pa.list_(pa.list_(pa.float32()))),
        nested(pa.large_list(pa.list_(pa.float32(), 3))),
        nested(pa.list_view(pa.list_(pa.float32()))),
        nested(pa.list_(pa.large_list(pa.float32()), 2)),
    ],
    ids=lambda column: str(column.type)[:60],
)
def test_every_way_to_store_a_tensor_sliced_and_with_nulls(tmp_path: Path, column: pa.Array) -> None:
    path = identity(tmp_path / "matrix.onnx", FLOAT, ["N", 2, 3])
    with_null = pa.concat_arrays([column, pa.nulls(1, column.type), column.slice(0, 1)]).slice(1)
    columns = pa.record_batch({"x": with_null})
    assert OnnxEngine.check(SPEC, model_at(path), columns.schema) == ("x",)
    made = engine(path, SPEC, tmp_path, max_batch=2)
    table, failures = run(made, SPEC, columns, size=4)
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == {3: "missing_value"}
    found = table.column("y").combine_chunks().to_numpy_ndarray()
    assert np.array_equal(found, TENSORS[[1, 2, 3, 0]])


def test_rows_that_are_no_tensor_of_the_graph_fail_alone(two_by_two: Path, tmp_path: Path) -> None:
    kind = pa.list_(pa.list_(pa.float32()))
    good = [[1.0, 2.0, 3.0]]
    columns = pa.record_batch(
        {
            "a": pa.array([good, [[1.0, 2.0]], [[1.0, 2.0, 3.0], [1.0]], [[1.0, None, 3.0]], None, [None], []], kind),
            "b": pa.array([good, good, good, good, good, good, []], kind),
        }
    )
    made = engine(two_by_two, SPEC, tmp_path)
    table, failures = run(made, SPEC, columns)
    made.close()
    codes = {row: failure.code for row, failure in failures.items()}
    assert codes == {1: "wrong_shape", 2: "wrong_shape", 3: "missing_value", 4: "missing_value", 5: "missing_value"}
    assert "input 'a': axis 1 of the row is 2, the graph wants 3" in failures[1].message
    assert "unequal lengths" in failures[2].message
    assert table.column("sum").to_pylist() == [[[2.0, 4.0, 6.0]], []]


def two_lengths(path: Path, *names: Any) -> Path:
    """a + b, whose second axes have these names."""
    dims = [["N", name, 3] for name in names]
    return graph(
        path,
        [helper.make_node("Add", ["a", "b"], ["sum"])],
        [value("a", FLOAT, dims[0]), value("b", FLOAT, dims[1])],
        [value("sum", FLOAT, ["N", None, 3])],
    )


@pytest.mark.parametrize(
    ("names", "code", "says"),
    [
        (["L", "L"], "wrong_shape", "input 'b': axis 0 of the row is 4, and 'L' is 2 by axis 0 of input 'a'"),
        ([None, None], "engine_refused", "Add"),
    ],
)
def test_a_row_whose_tensors_do_not_go_together_fails_alone(
    tmp_path: Path, names: list[Any], code: str, says: str
) -> None:
    """Each fits the graph, their sum does not: seen before the run where the axes share a name."""
    kind = pa.list_(pa.list_(pa.float32(), 3))
    rows = [np.ones((2, 3)).tolist()] * 9
    other = [*rows[:4], np.ones((4, 3)).tolist(), *rows[5:]]
    columns = pa.record_batch({"a": pa.array(rows, kind), "b": pa.array(other, kind)})
    made = engine(two_lengths(tmp_path / "add.onnx", *names), SPEC, tmp_path)
    table, failures = run(made, SPEC, columns)
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == {4: code}
    assert says in failures[4].message
    assert table.num_rows == 8


@pytest.mark.parametrize(
    ("nodes", "code", "says"),
    [
        ([helper.make_node("Gather", ["table", "x"], ["y"])], "invalid_value", "index 99 lies outside the graph's"),
        (
            [helper.make_node("Add", ["x", "zero"], ["i"]), helper.make_node("Gather", ["table", "i"], ["y"])],
            "engine_refused",
            "indices element out of data bounds",
        ),
    ],
    ids=["seen before the run", "found by halving the batch"],
)
def test_one_bad_index_does_not_fail_its_batch(tmp_path: Path, nodes: list[Any], code: str, says: str) -> None:
    """Gather with an index out of range fails everything that it is run with."""
    path = graph(
        tmp_path / "gather.onnx",
        nodes,
        [value("x", INT64, ["N"])],
        [value("y", FLOAT, ["N"])],
        [
            helper.make_tensor("table", FLOAT, [5], [0.0, 10.0, 20.0, 30.0, 40.0]),
            helper.make_tensor("zero", INT64, [], [0]),
        ],
    )
    made = engine(path, SPEC, tmp_path)
    indices = [1, 2, 99, 4, -5, 0, -77, 3]
    table, failures = run(made, SPEC, pa.record_batch({"x": indices}))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == dict.fromkeys([2, 6], code)
    assert says in failures[2].message
    assert table.column("y").to_pylist() == [10.0, 20.0, 40.0, 0.0, 0.0, 30.0]


def test_nan_is_a_value_unless_the_job_refuses_it(tmp_path: Path) -> None:
    path = identity(tmp_path / "i.onnx", FLOAT, ["N", 2])
    rows = [[1.0, 2.0], [np.nan, 1.0], [1.0, -np.inf], [np.nan, np.inf]]
    columns = pa.record_batch({"x": pa.array(rows, pa.list_(pa.float32(), 2))}).slice(1)
    made = engine(path, SPEC, tmp_path)
    table, failures = run(made, SPEC, columns)
    made.close()
    assert not failures and table.num_rows == 3
    made = engine(path, SPEC, tmp_path, finite=True)
    _, failures = run(made, SPEC, pa.record_batch({"x": columns["x"]}))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == dict.fromkeys([0, 1, 2], "not_finite")
    assert failures[1].message == "input 'x' holds -inf, which the job refuses"


@pytest.mark.parametrize(
    ("kind", "values", "not_held"),
    [
        ("bfloat16", [0.0, -1.5, 2.0**127, np.inf], [1.001, 1e-45, 3.4e38]),
        ("float8e4m3fn", [0.0, 448.0, -0.001953125], [449.0, 1.01, np.inf]),
        ("float8e5m2", [57344.0, -np.inf, 1.25], [60000.0, 1.1]),
    ],
)
def test_types_that_arrow_has_not_travel_in_the_next_wider_one(
    tmp_path: Path, kind: str, values: list[float], not_held: list[float]
) -> None:
    element = getattr(TensorProto, kind.upper())
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    path = graph(tmp_path / "n.onnx", nodes, [value("x", element, ["N"])], [value("y", element, ["N"])], opset=21)
    column = pa.array([*values, *not_held, None], pa.float32())
    columns = pa.record_batch({"x": column})
    assert OnnxEngine.check(SPEC, model_at(path), columns.schema) == ("x",)
    made = engine(path, SPEC, tmp_path)
    table, failures = run(made, SPEC, columns)
    made.close()
    assert table.schema.field("y").type == pa.float32()
    assert table.column("y").to_pylist() == values
    n = len(values)
    expected = dict.fromkeys(range(n, n + len(not_held)), "invalid_value") | {len(column) - 1: "missing_value"}
    assert {row: failure.code for row, failure in failures.items()} == expected
    assert f"is no {made_of(kind)}; round the column before" in failures[n].message
    with pytest.raises(InvalidInput, match="does not convert"):
        OnnxEngine.check(SPEC, model_at(path), pa.schema([pa.field("x", pa.float64())]))


def made_of(kind: str) -> str:
    dtype = low_precision.dtype_of(kind)
    assert dtype is not None
    return dtype.name


def test_rows_of_any_rank_where_the_graph_leaves_it_open(tmp_path: Path) -> None:
    path = graph(
        tmp_path / "open.onnx",
        [helper.make_node("Neg", ["x"], ["y"])],
        [value("x", FLOAT, None)],
        [value("y", FLOAT, None)],
    )
    kind = pa.struct([pa.field("shape", pa.list_(pa.int32())), pa.field("data", pa.list_(pa.float32()))])
    rows = [
        {"shape": [2, 1], "data": [1.0, 2.0]},
        {"shape": [], "data": [3.0]},
        None,
        {"shape": [1, 0, 2], "data": []},
        {"shape": [2, 2], "data": [1.0]},
        {"shape": [1, 1, 1, 1, 1, 1, 2], "data": [5.0, 6.0]},
    ]
    made = engine(path, SPEC, tmp_path)
    table, failures = run(made, SPEC, pa.record_batch({"x": pa.array([rows[0], *rows], kind)}).slice(1))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == {2: "missing_value", 4: "invalid_value"}
    assert table.column("y").to_pylist() == [
        {"shape": row["shape"], "data": [-number for number in row["data"]]}  # type: ignore[attr-defined]
        for row in (rows[0], rows[1], rows[3], rows[5])
        if row
    ]


def test_rows_that_change_each_other_are_run_alone(tmp_path: Path) -> None:
    path = graph(
        tmp_path / "softmax.onnx",
        [helper.make_node("Softmax", ["x"], ["y"], axis=0)],
        [value("x", FLOAT, ["N", 2])],
        [value("y", FLOAT, ["N", 2])],
    )
    said: list[str] = []
    made = engine(path, SPEC, tmp_path, said)
    columns = pa.record_batch({"x": pa.array([[float(i), 1.0] for i in range(50)], pa.list_(pa.float32(), 2))})
    table, _ = run(made, SPEC, columns)
    stats = made.stats()
    made.close()
    assert table.column("y").to_pylist() == [[1.0, 1.0]] * 50
    assert not stats["stacked"] and any("run alone" in message for message in said)


def test_a_graph_that_loses_its_first_axis_says_so(tmp_path: Path) -> None:
    axes = helper.make_tensor("axes", INT64, [1], [0])
    path = graph(
        tmp_path / "sum.onnx",
        [helper.make_node("Tile", ["x", "twice"], ["y"])],
        [value("x", FLOAT, ["N"])],
        [value("y", FLOAT, [None])],
        [helper.make_tensor("twice", INT64, [1], [2]), axes],
    )
    made = engine(path, SPEC, tmp_path)
    with pytest.raises(InvalidJob, match=r"row_mode: .*first axis does not count rows; set it to 'whole'"):
        run(made, SPEC, pa.record_batch({"x": pa.array([1.0, 2.0], pa.float32())}))
    made.close()
    whole = engine(path, SPEC, tmp_path, row_mode="whole")
    column = pa.array([[1.0, 2.0], [3.0]], pa.list_(pa.float32()))
    table, _ = run(whole, SPEC, pa.record_batch({"x": column}))
    whole.close()
    assert table.column("y").to_pylist() == [[1.0, 2.0, 1.0, 2.0], [3.0, 3.0]]


@pytest.mark.parametrize(
    ("dims", "out", "shape", "mode", "expected"),
    [
        ([1, 2], [1, 2], (2,), "unit", pa.list_(pa.float32(), 2)),
        ([1, 2], [1, 2], (1, 2), "unit", pa.list_(pa.float32(), 2)),
        ([3, 2], [3, 2], (3, 2), "whole", pa.fixed_shape_tensor(pa.float32(), [3, 2])),
        ([], [], (), "whole", pa.float32()),
        ([1, 2], [2, 1], (1, 2), "whole", pa.fixed_shape_tensor(pa.float32(), [2, 1])),
        (["N", 2, 0], ["N", 2, 0], (2, 0), "stack", pa.list_(pa.list_(pa.float32()))),
        (["N", 1, 1, 2, 1, 1, 2], ["N", 1, 1, 2, 1, 1, 2], (1, 1, 2, 1, 1, 2), "stack", None),
    ],
)
def test_what_a_row_is_follows_from_the_graph(
    tmp_path: Path, dims: list[Any], out: list[Any], shape: tuple[int, ...], mode: str, expected: pa.DataType | None
) -> None:
    if dims == out:
        path = identity(tmp_path / "g.onnx", FLOAT, dims)
    else:
        path = graph(
            tmp_path / "g.onnx",
            [helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])],
            [value("x", FLOAT, dims)],
            [value("y", FLOAT, out)],
        )
    data = np.random.default_rng(0).normal(size=(5, *shape)).astype(np.float32)
    kind: pa.DataType = pa.float32()
    for _ in shape:
        kind = pa.list_(kind)
    columns = pa.record_batch({"x": pa.array(data.tolist(), kind)})
    OnnxEngine.check(SPEC, model_at(path), columns.schema)
    made = engine(path, SPEC, tmp_path)
    table, failures = run(made, SPEC, columns)
    assert made.stats()["row_mode"] == mode
    made.close()
    assert not failures
    if expected is not None:
        assert table.schema.field("y").type == expected
    flat = [np.asarray(row, np.float32).reshape(-1).tolist() for row in table.column("y").to_pylist()]
    assert flat == data.reshape(5, -1).tolist()


@pytest.mark.parametrize(
    ("kind", "data", "leaf"),
    [
        (FLOAT, [[1.5, -2.0], [0.0, 3.0], [4.0, 5.0]], pa.float32()),
        (INT64, [[1, -2], [0, 2**53 + 1], [4, 5]], pa.int64()),
        (BOOL, [[True, False], [False, False], [True, True]], pa.bool_()),
        (STRING, [["a", ""], ["ü", "b"], ["c", "d"]], pa.string()),
    ],
)
def test_vectors_of_a_fixed_size_are_lists_of_a_fixed_size(tmp_path: Path, kind: int, data: Any, leaf: Any) -> None:
    path = identity(tmp_path / "g.onnx", kind, ["N", 2])
    made = engine(path, SPEC, tmp_path)
    columns = pa.record_batch({"x": pa.array(data, pa.list_(leaf, 2))})
    table, failures = run(made, SPEC, columns)
    assert not failures and table.schema.field("y").type == pa.list_(leaf, 2)
    assert table.column("y").to_pylist() == data
    pq.write_table(table, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(table)
    tensors = job("tensor", tensor_columns=True)
    table, _ = run(made, tensors, columns)
    made.close()
    numbers = kind in (FLOAT, INT64)  # Arrow's tensors of booleans and texts do not become arrays of numpy
    assert table.schema.field("y").type == (pa.fixed_shape_tensor(leaf, [2]) if numbers else pa.list_(leaf, 2))
    column = table.column("y").combine_chunks()
    assert (column.to_numpy_ndarray().tolist() if numbers else column.to_pylist()) == data


def test_strings_and_booleans_of_rank_two(tmp_path: Path) -> None:
    path = identity(tmp_path / "s.onnx", STRING, ["N", 2])
    made = engine(path, SPEC, tmp_path)
    rows = [["a", "b"], ["", "ü"], ["x" * 300, "y"]]
    table, _ = run(made, SPEC, pa.record_batch({"x": pa.array(rows, pa.list_(pa.string(), 2))}))
    made.close()
    assert table.column("y").to_pylist() == rows
    path = identity(tmp_path / "b.onnx", BOOL, ["N", 3])
    made = engine(path, SPEC, tmp_path)
    flags = np.random.default_rng(0).random((50, 3)) > 0.5
    column = pa.array(flags.tolist(), pa.list_(pa.bool_(), 3))
    table, _ = run(made, SPEC, pa.record_batch({"x": column}).slice(5))
    made.close()
    assert table.column("y").to_pylist() == flags[5:].tolist()


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        (pa.float64(), InvalidInput, "inputs.x: column 'x' is double, which does not convert to x: float32"),
        (pa.list_(pa.float32(), 2), InvalidInput, r"holds float32\[2\] per row; .* wants \[2, 3\]"),
        (pa.list_(pa.list_(pa.float32(), 4), 2), InvalidInput, r"holds float32\[2, 4\] per row; .* wants \[2, 3\]"),
        (pa.timestamp("s"), InvalidInput, "holds no tensors"),
    ],
    ids=str,
)
def test_check_refuses_columns_that_do_not_fit(tmp_path: Path, kind: Any, error: Any, says: str) -> None:
    path = identity(tmp_path / "m.onnx", FLOAT, ["N", 2, 3])
    with pytest.raises(error, match=says):
        OnnxEngine.check(SPEC, model_at(path), pa.schema([pa.field("x", kind)]))


def test_check_refuses_missing_columns_and_unknown_inputs(two_by_two: Path, tmp_path: Path) -> None:
    schema = pa.schema([pa.field("a", pa.list_(pa.list_(pa.float32())))])
    with pytest.raises(InvalidInput, match=r"inputs.b: the input has no column 'b'; it has a"):
        OnnxEngine.check(SPEC, model_at(two_by_two), schema)
    with pytest.raises(InvalidJob, match="the graph has no input c; it has a, b"):
        OnnxEngine.check(job("tensor", inputs={"c": "a"}), model_at(two_by_two), schema)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph at all")
    with pytest.raises(InvalidModel, match="not a readable ONNX file"):
        OnnxEngine.check(SPEC, model_at(broken), schema)


def test_a_graph_with_outputs_that_are_no_tensors_is_refused(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    nodes = [helper.make_node("SequenceConstruct", ["x"], ["y"])]
    path = graph(tmp_path / "seq.onnx", nodes, [value("x", FLOAT, ["N"])], [sequence])
    with pytest.raises(InvalidModel, match="'y' is a sequence_type"):
        OnnxEngine.check(SPEC, model_at(path), pa.schema([pa.field("x", pa.float32())]))
    with pytest.raises(InvalidModel, match=r"seq\(tensor\(float\)\)"):
        engine(path, SPEC, tmp_path)


def test_a_graph_in_a_directory_is_chosen_by_file(tmp_path: Path) -> None:
    identity(tmp_path / "m" / "model.onnx", FLOAT, ["N"])
    identity(tmp_path / "m" / "onnx" / "other.onnx", INT64, ["N"])
    spec = job("tensor", engine_options={"file": "onnx/other.onnx"})
    with pytest.raises(InvalidInput, match="does not convert"):
        OnnxEngine.check(spec, model_at(tmp_path / "m"), pa.schema([pa.field("x", pa.float32())]))
    made = engine(tmp_path / "m", spec, tmp_path, file="onnx/other.onnx")
    assert made.result_schema(spec) == pa.schema([pa.field("y", pa.int64())])
    made.close()


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A graph that counts for hours: only a terminated run ends it."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "sum"], ["next"]),
        ],
        "body",
        [value("i", INT64, []), value("go", BOOL, []), value("sum", FLOAT, None)],
        [value("go_on", BOOL, []), value("next", FLOAT, None)],
    )
    return graph(
        tmp_path / "endless.onnx",
        [helper.make_node("Loop", ["many", "true", "x"], ["y"], body=body)],
        [value("x", FLOAT, ["N"])],
        [value("y", FLOAT, ["N"])],
        [helper.make_tensor("many", INT64, [], [10**12]), helper.make_tensor("true", BOOL, [], [True])],
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set when a run has been handed to ONNX Runtime."""
    event = threading.Event()
    enter = CancelScope.enter

    def told(call: CancelScope, options: Any) -> None:
        enter(call, options)
        event.set()

    monkeypatch.setattr(CancelScope, "enter", told)
    return event  # type: ignore[return-value]


def test_cancel_terminates_the_run_in_flight(endless: Path, tmp_path: Path, started: threading.Event) -> None:
    made = engine(endless, SPEC, tmp_path)
    cancel = Cancellation()
    columns = pa.record_batch({"x": pa.array([1.0] * 4, pa.float32())})

    def stop() -> None:
        started.wait()
        cancel.cancel("job cancelled")

    canceller = threading.Thread(target=stop)
    canceller.start()
    assert list(made.infer(SPEC, batches(columns, 1), cancel)) == []
    canceller.join()
    made.close()


def test_a_row_that_takes_too_long_fails_alone(tmp_path: Path) -> None:
    """The graph counts to the largest number of its batch, so one row holds up all those beside it."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["sum"], ["next"])],
        "body",
        [value("i", INT64, []), value("go", BOOL, []), value("sum", INT64, [])],
        [value("go_on", BOOL, []), value("next", INT64, [])],
    )
    path = graph(
        tmp_path / "count.onnx",
        [
            helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            helper.make_node("Loop", ["most", "true", "zero"], ["sum"], body=body),
            helper.make_node("Add", ["x", "sum"], ["y"]),
        ],
        [value("x", INT64, ["N"])],
        [value("y", INT64, ["N"])],
        [helper.make_tensor("true", BOOL, [], [True]), helper.make_tensor("zero", INT64, [], [0])],
    )
    numbers = [3, 1, 10**12, 4, 1, 5, 9, 2, 10**12, 6]
    made = engine(path, SPEC, tmp_path, row_timeout=0.5)
    table, failures = run(made, SPEC, pa.record_batch({"x": numbers}))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == dict.fromkeys([2, 8], "timed_out")
    assert failures[2].message == "the run took longer than row_timeout, 0.5 s"
    assert table.column("y").to_pylist() == [number for number in numbers if number < 10]


def test_sessions_of_another_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(identity(tmp_path / "x.onnx", FLOAT, ["N"]), SPEC, tmp_path)
    monkeypatch.setattr(session_pool.os, "getpid", lambda: 1)
    with pytest.raises(EngineDead, match="another process"):
        made.infer(SPEC, iter(()), Cancellation())
    made.close()


def saved(path: Path, model: onnx.ModelProto, **more: Any) -> Path:
    onnx.save(model, str(path), **more)
    return path


def test_weights_beside_the_graph_are_read_and_part_of_what_the_model_is(tmp_path: Path) -> None:
    """Weights in a file of their own, which ONNX Runtime maps into memory instead of reading it whole."""
    weights = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [value("x", FLOAT, ["N", 8])],
        [value("y", FLOAT, ["N", 4])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    outside: dict[str, Any] = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    path = saved(tmp_path / "model.onnx", model, **outside)
    assert (tmp_path / "weights.bin").stat().st_size == weights.nbytes
    first = resolve(str(path), tmp_path / "cache")
    rows = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
    columns = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 8)})
    loaded = OnnxEngine(first, SPEC.task, {}, EngineContext(tmp_path))
    loaded.load()
    table, failures = run(loaded, SPEC, columns)
    loaded.close()
    assert not failures
    assert np.allclose(vectors(table.column("y")), rows @ weights, atol=1e-5)
    (tmp_path / "weights.bin").write_bytes((weights * 2).tobytes())
    assert resolve(str(path), tmp_path / "cache").digest != first.digest
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InvalidModel, match=r"keeps weights in 'weights.bin', which is not beside it"):
        resolve(str(path), tmp_path / "cache")


@pytest.mark.parametrize("kind", ["quantized", "dynamic", "half"])
def test_quantized_and_mixed_precision_graphs(tmp_path: Path, kind: str) -> None:
    """Inputs and outputs in float32, the arithmetic inside in 8 bits with scales, or in float16.

    On a processor without VNNI this also shows that 8-bit products do not saturate, which costs an error above 1.
    """
    weights = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    scale = float(np.abs(weights).max() / 127)
    stored = np.rint(weights / scale).astype(np.int8)
    if kind == "quantized":
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"]),
            helper.make_node("MatMul", ["xd", "wd"], ["y"]),
        ]
        initializers = [
            helper.make_tensor("xs", FLOAT, [], [4 / 127]),
            helper.make_tensor("xz", TensorProto.UINT8, [], [128]),
            helper.make_tensor("ws", FLOAT, [], [scale]),
            helper.make_tensor("wz", TensorProto.INT8, [], [0]),
            onnx.numpy_helper.from_array(stored, "wq"),
        ]
    elif kind == "dynamic":
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            helper.make_node("MatMulInteger", ["xq", "wq", "xz", "wz"], ["yi"]),
            helper.make_node("Cast", ["yi"], ["yf"], to=FLOAT),
            helper.make_node("Mul", ["xs", "ws"], ["s"]),
            helper.make_node("Mul", ["yf", "s"], ["y"]),
        ]
        initializers = [
            helper.make_tensor("ws", FLOAT, [], [scale]),
            helper.make_tensor("wz", TensorProto.INT8, [], [0]),
            onnx.numpy_helper.from_array(stored, "wq"),
        ]
    else:
        nodes = [
            helper.make_node("Cast", ["x"], ["xh"], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", ["xh", "w"], ["yh"]),
            helper.make_node("Cast", ["yh"], ["y"], to=FLOAT),
        ]
        initializers = [onnx.numpy_helper.from_array(weights.astype(np.float16), "w")]
    inputs, outputs = [value("x", FLOAT, ["N", 8])], [value("y", FLOAT, ["N", 4])]
    path = graph(tmp_path / "model.onnx", nodes, inputs, outputs, initializers, opset=21)
    rows = np.random.default_rng(1).uniform(-4, 3.9, size=(40, 8)).astype(np.float32)
    columns = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 8)})
    made = engine(path, SPEC, tmp_path)
    table, failures = run(made, SPEC, columns)
    # With a scale taken from the batch, a row's result would depend on its company: such rows run alone.
    assert not failures and made.stats()["stacked"] == (kind != "dynamic")
    made.close()
    found = vectors(table.column("y"))
    settings = onnxruntime.SessionOptions()
    for name, said in int8_overflow.session_config(onnxruntime).items():
        settings.add_session_config_entry(name, said)
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    parts = np.split(rows, len(rows)) if kind == "dynamic" else [rows]
    assert np.allclose(found, np.concatenate([session.run(None, {"x": x})[0] for x in parts]), rtol=1e-3, atol=1e-3)
    assert np.abs(found - rows @ weights).max() < {"quantized": 0.2, "dynamic": 0.2, "half": 0.01}[kind]
