"""Rows of different size that run together: padded, with a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pipeline.engines.base import Cancellation
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.runtime.signature import GraphValue, Signature
from pipeline.engines.onnx.tensor.batching import MOST_PADDING, Batching
from pipeline.engines.onnx.tensor.masks import Masks
from pipeline.engines.onnx.tensor.row_tensors import RowTensors
from storage.errors import InvalidInput, InvalidJob
from tests.engines.onnx.support import FLOAT, INT64, STRING, batches, engine, graph, job, model_at, run, value, vectors

MASKS = {"L": "mask"}
SPEC = job("tensor", engine_options={"masks": MASKS})
KIND = pa.list_(pa.list_(pa.float32(), 4))


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [N, L, 4], mask [N, L] → states [N, L, 4], of self-attention over what the mask leaves, and their mean."""
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    far = numpy_helper.from_array(np.array(-1e9, np.float32), "far")
    last = numpy_helper.from_array(np.array([2], np.int64), "last")
    middle = numpy_helper.from_array(np.array([1], np.int64), "middle")
    node = helper.make_node
    return graph(
        tmp_path_factory.mktemp("attention") / "attention.onnx",
        [
            node("Cast", ["mask"], ["real"], to=FLOAT),
            node("Sub", ["one", "real"], ["hidden"]),
            node("Mul", ["hidden", "far"], ["low"]),
            node("Unsqueeze", ["low", "middle"], ["bias"]),
            node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
            node("MatMul", ["x", "turned"], ["products"]),
            node("Add", ["products", "bias"], ["scores"]),
            node("Softmax", ["scores"], ["weights"], axis=-1),
            node("MatMul", ["weights", "x"], ["states"]),
            node("Unsqueeze", ["real", "last"], ["column"]),
            node("Mul", ["states", "column"], ["kept"]),
            node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
            node("ReduceSum", ["column", "middle"], ["count"], keepdims=0),
            node("Div", ["sum", "count"], ["mean"]),
        ],
        [value("x", FLOAT, ["N", "L", 4]), value("mask", INT64, ["N", "L"])],
        [value("states", FLOAT, ["N", "L", 4]), value("mean", FLOAT, ["N", 4])],
        [one, far, last, middle],
    )


def simple(path: Path, nodes: list[Any], mean: list[Any], kind: int = FLOAT) -> Path:
    """x [N, L], mask [N, L] → mean, by ``nodes``, and the mask."""
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    zeroth = numpy_helper.from_array(np.array([0], np.int64), "zeroth")
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    return graph(
        path,
        [*nodes, helper.make_node("Identity", ["mask"], ["same"])],
        [value("x", kind, ["N", "L"]), value("mask", FLOAT, ["N", "L"])],
        [value("mean", kind, mean), value("same", FLOAT, ["N", "L"])],
        [axis, zeroth, half],
    )


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [N, L], mask [N, L] → the mean of x over L [N], whatever the mask says, and the mask."""
    node = helper.make_node("ReduceMean", ["x", "axis"], ["mean"], keepdims=0)
    return simple(tmp_path_factory.mktemp("careless") / "careless.onnx", [node], ["N"])


def ragged(lengths: list[int], seed: int = 0) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, 4)).astype(np.float32) for n in lengths]


def column(rows: list[np.ndarray[Any, Any]]) -> pa.Array:
    return pa.array([row.tolist() for row in rows], KIND)


def alone(path: Path, x: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: Any = session.run(None, {"x": x[None], "mask": mask[None]})
    return [output[0] for output in found]


def check_rows(
    path: Path, table: pa.Table, rows: list[np.ndarray[Any, Any]], masks: list[np.ndarray[Any, Any]]
) -> None:
    means = vectors(table.column("mean"))
    for at, (x, mask) in enumerate(zip(rows, masks, strict=True)):
        states, mean = alone(path, x, mask)
        found = np.asarray(table.column("states")[at].as_py(), np.float32).reshape(-1, 4)
        assert found.shape == states.shape, "padding is cut off"
        assert np.allclose(found, states, atol=1e-5)
        assert np.allclose(means[at], mean, atol=1e-5)


def test_rows_of_every_size_run_together_and_are_what_they_are_alone(attention: Path, tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 300).tolist()
    rows = ragged(lengths)
    columns = pa.record_batch({"x": column(rows)})
    assert OnnxEngine.check(SPEC, model_at(attention), columns.schema) == ("x",)
    made = engine(attention, SPEC, tmp_path, masks=MASKS)
    table, failures = run(made, SPEC, columns, size=300)
    stats = made.stats()
    made.close()
    assert not failures
    check_rows(attention, table, rows, [np.ones(n, np.int64) for n in lengths])
    assert stats["padded"] and stats["padded_rows"] > 250
    # By exact size there would be some 59.
    assert stats["runs"] - stats["compared_rows"] < 20


def test_own_masks_are_kept_and_rows_that_show_nothing_are_not_padded(attention: Path, tmp_path: Path) -> None:
    lengths = [3, 9, 10, 8, 10, 9, 7, 8]
    rows = ragged(lengths)
    masks = [np.ones(n, np.int64) for n in lengths]
    masks[1][4:] = 0
    masks[3][:] = 0  # attends to everything alike: to padding, too, if it had any
    columns = pa.record_batch({"x": column(rows), "m": pa.array([m.tolist() for m in masks])})
    spec = job("tensor", inputs={"mask": "m"}, engine_options={"masks": MASKS})
    assert OnnxEngine.check(spec, model_at(attention), columns.schema) == ("x", "m")
    made = engine(attention, spec, tmp_path, masks=MASKS)
    table, failures = run(made, spec, columns)
    stats = made.stats()
    made.close()
    assert not failures and stats["padded_rows"]
    states = table.column("states").to_pylist()
    for at, (x, mask) in enumerate(zip(rows, masks, strict=True)):
        expected = alone(attention, x, mask)[0]
        assert np.allclose(np.asarray(states[at], np.float32), expected, atol=1e-5), at


def test_a_row_whose_own_mask_is_of_another_size_fails_alone(attention: Path, tmp_path: Path) -> None:
    rows = ragged([3, 4, 5, 6])
    masks = [[1] * 3, [1] * 4, [1] * 4, None]
    columns = pa.record_batch({"x": column(rows), "mask": pa.array(masks, pa.list_(pa.int64()))})
    made = engine(attention, SPEC, tmp_path, masks=MASKS)
    table, failures = run(made, SPEC, columns)
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == {2: "wrong_shape", 3: "missing_value"}
    assert [len(states) for states in table.column("states").to_pylist()] == [3, 4]


def flat(rows: list[np.ndarray[Any, Any]]) -> pa.RecordBatch:
    return pa.record_batch({"x": pa.array([row.tolist() for row in rows], pa.list_(pa.float32()))})


def floats(lengths: list[int], seed: int = 3) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=n).astype(np.float32) for n in lengths]


def test_a_graph_that_heeds_no_mask_is_found_out_and_nothing_is_padded(careless: Path, tmp_path: Path) -> None:
    lengths = np.random.default_rng(2).integers(1, 30, 200).tolist()
    rows = floats(lengths)
    said: list[str] = []
    made = engine(careless, SPEC, tmp_path, said, masks=MASKS)
    table, failures = run(made, SPEC, flat(rows), size=50)
    stats = made.stats()
    made.close()
    assert not failures
    assert np.allclose(table.column("mean").to_numpy(), [row.mean() for row in rows], atol=1e-5)
    assert [len(one) for one in table.column("same").to_pylist()] == lengths
    assert not stats["padded"] and not stats.get("padded_rows")
    assert stats["stacked"], "rows of one size still run together"
    assert sum("padded" in message for message in said) == 1
    assert sum("no column 'mask'" in message for message in said) == 1


@pytest.mark.parametrize(
    ("operator", "first"),
    [
        ("ReduceMean", [np.ones(2000, np.float32), np.ones(1999, np.float32)]),  # hardly padded
        ("ReduceMean", [np.zeros(4, np.float32), np.zeros(3, np.float32)]),  # nothing to tell by
        ("ReduceMax", [np.array([5, 1, 2], np.float32), np.array([4, 1], np.float32)]),  # the rest does not matter
        ("ReduceMin", [np.array([-5, -1, -2, -3], np.float32), np.array([-4, -1], np.float32)]),
    ],
)
def test_rows_that_do_not_tell_prove_nothing(operator: str, first: list[np.ndarray[Any, Any]], tmp_path: Path) -> None:
    path = simple(tmp_path / "g.onnx", [helper.make_node(operator, ["x", "axis"], ["mean"], keepdims=0)], ["N"])
    rows = [*first, *(np.full(n, 1 + n, np.float32) - np.arange(n, dtype=np.float32) / n for n in range(40, 80))]
    rows += [-row for row in rows[2:]]
    made = engine(path, SPEC, tmp_path, masks=MASKS)
    table, _ = run(made, SPEC, flat(rows), size=2)
    stats = made.stats()
    made.close()
    numpy = {"ReduceMean": np.mean, "ReduceMax": np.max, "ReduceMin": np.min}[operator]
    assert np.allclose(table.column("mean").to_numpy(), [numpy(row) for row in rows], rtol=1e-5)
    assert not stats["padded"] and not stats.get("padded_rows")


def test_a_graph_in_which_rows_meet_is_found_out_among_padded_rows(tmp_path: Path) -> None:
    """It heeds its mask, but takes half of the mean over the rows off."""
    node = helper.make_node
    path = simple(
        tmp_path / "g.onnx",
        [
            node("Mul", ["x", "mask"], ["kept"]),
            node("ReduceSum", ["kept", "axis"], ["sum"], keepdims=0),
            node("ReduceMean", ["sum", "zeroth"], ["all"], keepdims=1),
            node("Mul", ["all", "half"], ["part"]),
            node("Sub", ["sum", "part"], ["mean"]),
        ],
        ["N"],
    )
    rows = floats(list(range(10, 60)))
    said: list[str] = []
    made = engine(path, SPEC, tmp_path, said, masks=MASKS)
    table, _ = run(made, SPEC, flat(rows))
    made.close()
    assert np.allclose(table.column("mean").to_numpy(), [row.sum() / 2 for row in rows], atol=1e-5)
    assert any("when they are stacked" in message for message in said)
    assert not any("padded" in message for message in said), "it is not the padding"


def test_a_mask_that_means_the_opposite_ends_the_job(tmp_path: Path) -> None:
    node = helper.make_node
    path = simple(
        tmp_path / "g.onnx",
        [
            node("Mul", ["x", "mask"], ["hidden"]),
            node("Sub", ["x", "hidden"], ["kept"]),
            node("ReduceSum", ["kept", "axis"], ["mean"], keepdims=0),
        ],
        ["N"],
    )
    rows = floats([6, 6, 6])
    made = engine(path, SPEC, tmp_path, masks=MASKS)
    with pytest.raises(InvalidJob, match="is 1 where the graph is to look away"):
        run(made, SPEC, flat(rows))
    made.close()
    own = job("tensor", inputs={"mask": "hidden"}, engine_options={"masks": MASKS})
    columns = flat(rows).append_column("hidden", pa.array([[0.0] * 6] * 3, pa.list_(pa.float32())))
    made = engine(path, own, tmp_path, masks=MASKS)
    table, failures = run(made, own, columns)
    made.close()
    assert not failures
    assert np.allclose(table.column("mean").to_numpy(), [row.sum() for row in rows], atol=1e-5)


def test_one_output_that_heeds_the_mask_proves_nothing_for_another(tmp_path: Path) -> None:
    """Silence at the end of a sound is what hides that its energy heeds no mask."""
    node = helper.make_node
    path = graph(
        tmp_path / "g.onnx",
        [
            node("Mul", ["x", "x"], ["squares"]),
            node("ReduceSum", ["squares", "axis"], ["energy"], keepdims=0),
            node("ReduceSum", ["mask", "axis"], ["count"], keepdims=0),
        ],
        [value("x", FLOAT, ["N", "L"]), value("mask", FLOAT, ["N", "L"])],
        [value("energy", FLOAT, ["N"]), value("count", FLOAT, ["N"])],
        [numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    silent = [np.concatenate([row, np.zeros_like(row)]) for row in floats([10, 9, 10, 9])]
    rows = [*silent, *floats(list(range(20, 60)))]
    made = engine(path, SPEC, tmp_path, masks=MASKS)
    table, _ = run(made, SPEC, flat(rows), size=4)
    stats = made.stats()
    made.close()
    assert np.allclose(table.column("energy").to_numpy(), [np.square(row).sum() for row in rows], rtol=1e-4)
    assert not stats["padded"] and not stats.get("padded_rows")


def test_an_output_without_rows_is_named_as_ever(tmp_path: Path) -> None:
    node = helper.make_node
    path = graph(
        tmp_path / "g.onnx",
        [node("Mul", ["x", "mask"], ["kept"]), node("ReduceSum", ["kept"], ["sum"], keepdims=0)],
        [value("x", FLOAT, ["N", "L"]), value("mask", FLOAT, ["N", "L"])],
        [value("sum", FLOAT, ["N"])],
    )
    made = engine(path, SPEC, tmp_path, masks=MASKS)
    with pytest.raises(InvalidJob, match="first axis does not count rows"):
        run(made, SPEC, flat(floats([6, 5, 6])))
    made.close()


def test_whole_numbers_are_padded_with_what_they_may_be(tmp_path: Path) -> None:
    """A zero behind a row would be a divisor."""
    node = helper.make_node
    hundred = numpy_helper.from_array(np.array(10_000, np.int64), "hundred")
    path = graph(
        tmp_path / "g.onnx",
        [
            node("Div", ["hundred", "x"], ["parts"]),
            node("Mul", ["parts", "mask"], ["kept"]),
            node("ReduceSum", ["kept", "axis"], ["sum"], keepdims=0),
        ],
        [value("x", INT64, ["N", "L"]), value("mask", INT64, ["N", "L"])],
        [value("parts", INT64, ["N", "L"]), value("sum", INT64, ["N"])],
        [hundred, numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 100, n) for n in range(20, 60)]
    columns = pa.record_batch({"x": pa.array([row.tolist() for row in rows])})
    made = engine(path, SPEC, tmp_path, masks=MASKS)
    table, failures = run(made, SPEC, columns)
    stats = made.stats()
    made.close()
    assert not failures and stats["padded_rows"] and not stats.get("batch_halvings")
    assert table.column("parts").to_pylist() == [(10_000 // row).tolist() for row in rows]
    assert table.column("sum").to_pylist() == [int((10_000 // row).sum()) for row in rows]


def test_texts_are_padded_and_cut(tmp_path: Path) -> None:
    node = helper.make_node
    path = graph(
        tmp_path / "g.onnx",
        [
            node("Identity", ["x"], ["y"]),
            node("ReduceSum", ["mask", "axis"], ["count"], keepdims=0),
        ],
        [value("x", STRING, ["N", "L"]), value("mask", INT64, ["N", "L"])],
        [value("y", STRING, ["N", "L"]), value("count", INT64, ["N"])],
        [numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    rows = [[f"{n} {at}" for at in range(n)] for n in (8, 9, 10, 9, 8, 7)]
    made = engine(path, SPEC, tmp_path, masks=MASKS)
    table, failures = run(made, SPEC, pa.record_batch({"x": pa.array(rows)}))
    stats = made.stats()
    made.close()
    assert not failures and stats["padded_rows"]
    assert table.column("y").to_pylist() == rows
    assert table.column("count").to_pylist() == [len(row) for row in rows]


def test_a_batch_of_a_fixed_size_takes_padded_rows(tmp_path: Path) -> None:
    node = helper.make_node
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    path = graph(
        tmp_path / "g.onnx",
        [node("Mul", ["x", "mask"], ["kept"]), node("ReduceSum", ["kept", "axis"], ["sum"], keepdims=0)],
        [value("x", FLOAT, [4, "L"]), value("mask", FLOAT, [4, "L"])],
        [value("sum", FLOAT, [4])],
        [axis],
    )
    spec = job("tensor", engine_options={"masks": MASKS, "row_mode": "stack"})
    rows = floats([9, 8, 10, 9, 11, 8, 10])
    made = engine(path, spec, tmp_path, masks=MASKS, row_mode="stack")
    table, failures = run(made, spec, flat(rows))
    stats = made.stats()
    made.close()
    assert not failures and stats["padded_rows"]
    assert np.allclose(table.column("sum").to_numpy(), [row.sum() for row in rows], atol=1e-5)


def test_an_output_that_is_longer_than_its_axis_is_left_whole(tmp_path: Path) -> None:
    """The graph declares [N, L] and gives one more; rows of one size are stacked, and nothing is padded."""
    node = helper.make_node
    path = graph(
        tmp_path / "g.onnx",
        [
            node("Slice", ["x", "zeroth", "one", "one"], ["head"]),
            node("Concat", ["head", "x"], ["y"], axis=1),
            node("Identity", ["mask"], ["same"]),
        ],
        [value("x", FLOAT, ["N", "L"]), value("mask", FLOAT, ["N", "L"])],
        [value("y", FLOAT, ["N", "L"]), value("same", FLOAT, ["N", "L"])],
        [
            numpy_helper.from_array(np.array([0], np.int64), "zeroth"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
        ],
    )
    rows = floats([5, 5, 5, 4, 4, 6])
    made = engine(path, SPEC, tmp_path, masks=MASKS)
    table, _ = run(made, SPEC, flat(rows))
    made.close()
    assert [len(row) for row in table.column("y").to_pylist()] == [6, 6, 6, 5, 5, 7]


@pytest.mark.parametrize("shape", [[2**40, 0], [2**33, 0], [3, 0]])
def test_a_row_of_huge_emptiness_fails_alone(tmp_path: Path, shape: list[int]) -> None:
    node = helper.make_node
    axes = numpy_helper.from_array(np.array([1], np.int64), "axis")
    path = graph(
        tmp_path / "g.onnx",
        [node("ReduceSum", ["mask", "axis"], ["count"], keepdims=0), node("ReduceSum", ["x"], ["all"], keepdims=1),
         node("Squeeze", ["all", "ends"], ["flat"]), node("Expand", ["flat", "size"], ["sum"])],
        [value("x", FLOAT, ["N", "L", "D"]), value("mask", FLOAT, ["N", "L"])],
        [value("count", FLOAT, ["N"])],
        [axes, numpy_helper.from_array(np.array([1, 2], np.int64), "ends"),
         numpy_helper.from_array(np.array([1], np.int64), "size")],
    )  # fmt: skip
    data = [([2, 3], [1.0] * 6), (shape, []), ([3, 3], [1.0] * 9)]
    column = pa.array(
        [{"shape": shape, "data": data} for shape, data in data],
        pa.struct({"shape": pa.list_(pa.int64()), "data": pa.list_(pa.float32())}),
    )
    made = engine(path, SPEC, tmp_path, masks=MASKS)
    table, failures = run(made, SPEC, pa.record_batch({"x": column}))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == ({} if shape[0] == 3 else {1: "invalid_value"})
    assert table.column("count").to_pylist() == ([2, 3, 3] if shape[0] == 3 else [2, 3])


def test_an_input_without_the_axis_does_not_hide_how_much_is_padded() -> None:
    signature = Signature(
        (
            GraphValue("image", np.dtype(np.float32), ("N", 1000)),
            GraphValue("ids", np.dtype(np.int64), ("N", "L")),
            GraphValue("mask", np.dtype(np.int64), ("N", "L")),
        ),
        (),
    )
    masks = Masks(signature, MASKS)
    given_ = {"image": tensors([[1000], [1000]], np.float32), "ids": tensors([[1], [64]], np.int64)}
    given_["mask"] = masks.made("L", given_)
    assert [part.tolist() for part in Batching(masks).parts(given_, np.arange(2), 16, 2**20)] == [[1], [0]]


def test_rows_without_elements_and_rows_of_all_elements(attention: Path, tmp_path: Path) -> None:
    rows = ragged([0, 5, 0, 4, 0])
    made = engine(attention, SPEC, tmp_path, masks=MASKS)
    table, failures = run(made, SPEC, pa.record_batch({"x": column(rows)}))
    made.close()
    assert not failures
    assert [len(states) for states in table.column("states").to_pylist()] == [0, 5, 0, 4, 0]


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"S": "mask"}, "no input but the mask has an axis 'S' behind its first; the names are L"),
        ({"N": "mask"}, "no input but the mask has an axis 'N'"),
        ({"L": "m"}, "the graph has no input 'm'; it has x, mask"),
        ({"L": "x"}, "is [rows, L] in numbers or booleans; the graph has x: float32[N, L, 4]"),
        ({"L": "mask", "K": "mask"}, "'mask' is named for L and K; each axis needs a mask of its own"),
    ],
)
def test_masks_that_the_graph_does_not_have(attention: Path, masks: dict[str, str], says: str) -> None:
    spec = job("tensor", engine_options={"masks": masks})
    with pytest.raises(InvalidJob) as refused:
        OnnxEngine.check(spec, model_at(attention), pa.schema({"x": KIND}))
    assert refused.value.field == "engine_options.masks"
    assert says in str(refused.value)


def test_rows_that_are_whole_inputs_are_not_padded(attention: Path) -> None:
    spec = job("tensor", engine_options={"masks": MASKS, "row_mode": "whole"})
    with pytest.raises(InvalidJob, match="only rows that are stacked are padded"):
        OnnxEngine.check(spec, model_at(attention), pa.schema({"x": KIND}))


def test_without_masks_the_column_is_wanted(attention: Path) -> None:
    with pytest.raises(InvalidInput, match="no column 'mask'"):
        OnnxEngine.check(job("tensor"), model_at(attention), pa.schema({"x": KIND}))


def test_a_cancelled_call_ends_and_the_next_one_pads(attention: Path, tmp_path: Path) -> None:
    columns = pa.record_batch({"x": column(ragged([1, 2, 3, 4] * 50))})
    made = engine(attention, SPEC, tmp_path, masks=MASKS)
    cancel = Cancellation()
    cancel.cancel("enough")
    assert not list(made.infer(SPEC, batches(columns), cancel))
    table, _ = run(made, SPEC, columns)
    made.close()
    assert table.num_rows == 200


AXES = Masks(
    Signature(
        (
            GraphValue("x", np.dtype(np.float32), ("N", "H", "W", 3)),
            GraphValue("y", np.dtype(np.int64), ("N", None)),
            GraphValue("rows", np.dtype(np.int64), ("N", "H")),
            GraphValue("columns", np.dtype(np.bool_), ("N", "W")),
        ),
        (GraphValue("z", np.dtype(np.float32), ("N", "W", "H")),),
    ),
    {"H": "rows", "W": "columns"},
)
TOGETHER = Batching(AXES)


def tensors(shapes: list[list[int]], dtype: Any) -> RowTensors:
    sizes = [int(np.prod(shape)) for shape in shapes]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    return RowTensors(np.arange(1, sum(sizes) + 1).astype(dtype), starts, np.array(shapes, np.int64))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 2)), min_size=1, max_size=60),
    st.integers(1, 16),
    st.integers(1, 4096),
)
def test_two_masked_axes(rows: list[tuple[int, int, int]], most_rows: int, most_bytes: int) -> None:
    given_ = {
        "x": tensors([[h, w, 3] for h, w, _ in rows], np.float32),
        "y": tensors([[k] for _, _, k in rows], np.int64),
    }
    given_ |= {mask: AXES.made(axis, given_) for axis, mask in AXES.of.items()}
    parts = TOGETHER.parts(given_, np.arange(len(rows)), most_rows, most_bytes)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
    for part in parts:
        assert len(part) <= most_rows
        assert len({rows[at][2] for at in part}) == 1, "an axis without a mask is not padded"
        stacked = TOGETHER.gather(given_, part)
        assert len(part) == 1 or sum(array.nbytes for array in stacked.values()) <= most_bytes
        for name in ("x", "rows", "columns"):
            real = sum(given_[name].gather(part[i : i + 1]).size for i in range(len(part)))
            assert stacked[name].size - real <= MOST_PADDING * stacked[name].size
        for i, at in enumerate(part):
            h, w, _ = rows[at]
            x = stacked["x"][i]
            assert np.array_equal(x[:h, :w], given_["x"].gather(part[i : i + 1])[0])
            assert stacked["rows"][i].sum() == h and stacked["columns"][i].sum() == w
            if len(part) > 1 and TOGETHER.unequal(given_, part):
                assert h and w, "a row without elements is not padded"
                assert (x[h:, :w] == x[h - 1, :w]).all() and (x[:, w:] == x[:, w - 1 : w]).all()
        most = TOGETHER.most_padded(given_, part)
        assert np.prod(rows[part[most]][:2]) == min(np.prod(rows[at][:2]) for at in part)
        output = np.zeros((len(part), stacked["x"].shape[2], stacked["x"].shape[1]), np.float32)
        runs = TOGETHER.alike(given_, part)
        assert sum(len(part[alike]) for alike in runs) == len(part)
        for alike in runs:
            (cut,) = AXES.cut([output[alike]], AXES.sizes(given_, int(part[alike.start])))
            assert all(cut.shape[1:] == (rows[at][1], rows[at][0]) for at in part[alike])
