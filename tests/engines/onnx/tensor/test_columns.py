"""Columns to tensors and back, for whatever Arrow can hold."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from pipeline.engines.onnx.runtime import low_precision
from pipeline.engines.onnx.runtime.ort import import_runtime
from pipeline.engines.onnx.tensor.arrow_types import lossless, tensor_kind
from pipeline.engines.onnx.tensor.from_arrow import read
from pipeline.engines.onnx.tensor.to_arrow import column_type, to_arrow

DTYPES = [np.float32, np.float64, np.float16, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64, np.bool_]


@st.composite
def rows(draw: st.DrawFn) -> list[np.ndarray[Any, Any] | None]:
    """Rows of one dtype and rank, each of its own shape or null."""
    dtype = draw(st.sampled_from(DTYPES))
    rank = draw(st.integers(0, 3))
    shapes = st.tuples(*[st.integers(0 if axis == rank - 1 else 1, 3) for axis in range(rank)])
    values = shapes.flatmap(
        lambda shape: hnp.arrays(dtype, shape, elements={"allow_nan": False} if dtype in DTYPES[:3] else None)
    )
    made = draw(st.lists(st.none() | values, min_size=1, max_size=8))
    return [None if row is None else row.astype(dtype) for row in made] or [np.zeros((1,) * rank, dtype)]


@settings(deadline=None)  # a busy machine is no failure
@given(rows(), st.integers(0, 3), st.booleans())
def test_nested_lists_come_back_as_they_went_in(
    made: list[np.ndarray[Any, Any] | None], skipped: int, large: bool
) -> None:
    some = next((row for row in made if row is not None), None)
    if some is None:
        return
    kind: pa.DataType = pa.from_numpy_dtype(some.dtype)
    for _ in range(some.ndim):
        kind = pa.large_list(kind) if large else pa.list_(kind)
    column = pa.array([None if row is None else row.tolist() for row in made], kind).slice(skipped)
    expected = made[skipped:]
    found = tensor_kind(kind)
    assert found is not None and found.dtype == some.dtype and found.dims == (None,) * some.ndim
    tensors = read(column, some.ndim, "x")
    assert {row: code for row, (code, _) in tensors.failures.items()} == {
        row: "missing_value" for row, value in enumerate(expected) if value is None
    }
    for row, value in enumerate(expected):
        if value is not None:
            assert np.array_equal(tensors.gather(np.array([row]))[0], value)


@settings(deadline=None)  # a busy machine is no failure
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=4), elements={"allow_nan": False}),
    st.randoms(),
)
def test_stacked_rows_in_any_order(stacked: np.ndarray[Any, Any], random: Any) -> None:
    kind = column_type(stacked.dtype, stacked.shape[1:])
    column = to_arrow(stacked, kind)
    assert column.type == kind
    order = np.array(random.sample(range(len(stacked)), random.randint(1, len(stacked))))
    assert np.array_equal(read(column, stacked.ndim - 1, "x").gather(order), stacked[order])


@settings(deadline=None)  # a busy machine is no failure
@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=3)))
def test_dynamic_and_open_shapes_round_trip(stacked: np.ndarray[Any, Any]) -> None:
    for dims in ([None] * (stacked.ndim - 1), None):
        column = to_arrow(stacked, column_type(stacked.dtype, dims))
        column.validate(full=True)
        if not len(stacked):
            continue
        tensors = read(column, stacked.ndim - 1, "x")
        tensors.fit(stacked.shape[1:], "x")
        assert not tensors.failures
        assert np.array_equal(tensors.gather(np.arange(len(stacked))), stacked)


def test_a_shape_that_does_not_match_its_data_is_an_invalid_value() -> None:
    kind = pa.struct([pa.field("shape", pa.list_(pa.int64())), pa.field("data", pa.list_(pa.float32()))])
    column = pa.array(
        [
            {"shape": [2], "data": [1.0, 2.0]},
            {"shape": [3], "data": [1.0]},
            {"shape": [1, 1], "data": [1.0]},
            {"shape": [-1], "data": []},
            {"shape": None, "data": []},
        ],
        kind,
    )
    codes = {row: str(code) for row, (code, _) in read(column, 1, "x").failures.items()}
    assert codes == {1: "invalid_value", 2: "wrong_shape", 3: "invalid_value", 4: "missing_value"}


@pytest.mark.parametrize(
    "kind", [pa.timestamp("s"), pa.decimal128(5, 2), pa.struct([]), pa.binary(), pa.date32()], ids=str
)
def test_what_is_no_tensor(kind: pa.DataType) -> None:
    assert tensor_kind(kind) is None
    assert tensor_kind(pa.list_(kind)) is None


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_a_cast_counts_as_lossless_only_when_the_extremes_survive(source: Any, target: Any) -> None:
    extremes: list[Any] = [0, 1]
    if np.dtype(source).kind in "iu":
        info = np.iinfo(source)
        extremes += [info.min, info.max, info.max - 1]
    elif np.dtype(source).kind == "f":
        extremes += [np.finfo(source).max, np.finfo(source).tiny, 1 + np.finfo(source).eps]
    if not lossless(np.dtype(source), np.dtype(target)):
        return
    values = np.array(extremes, dtype=source)
    assert values.astype(target).astype(object).tolist() == values.astype(object).tolist()


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)), max_size=8),
    st.integers(0, 3),
    st.data(),
)
def test_rows_of_any_rank_and_the_bad_ones_among_them(rows: list[Any], skipped: int, data: st.DataObject) -> None:
    """Structs of shape and data, sliced, some null: each row is as it was, and each bad element blames its own row."""
    nulls = [data.draw(st.booleans()) for _ in rows]
    kind = pa.struct([pa.field("shape", pa.list_(pa.int16())), pa.field("data", pa.large_list(pa.float32()))])
    made = [
        None if null else {"shape": list(row.shape), "data": row.reshape(-1).tolist()}
        for row, null in zip(rows, nulls, strict=True)
    ]
    found = read(pa.array(made, kind).slice(skipped), None, "x")
    found.finite("x")
    for at, (row, null) in enumerate(zip(rows[skipped:], nulls[skipped:], strict=True)):
        if null or not np.isfinite(row).all():
            assert found.failures[at][0] == ("missing_value" if null else "not_finite")
        else:
            assert at not in found.failures
            assert np.array_equal(found.gather(np.array([at]))[0], row)
            assert found.gather(np.array([at])).shape == (1, *row.shape)


@pytest.mark.parametrize("kind", ["int4", "uint4", "int2", "uint2"])
def test_small_integers_go_into_a_session_and_come_out(kind: str) -> None:
    dtype = low_precision.dtype_of(kind)
    assert dtype is not None
    wide = "int8" if kind.startswith("int") else "uint8"
    n = 1 << int(kind[-1])
    for count in range(34):  # whole bytes and parts of one
        numbers = np.resize(np.arange(n) - (n // 2 if kind.startswith("int") else 0), count)
        packed = _cast(numbers.astype(wide), wide, kind)
        assert packed.dtype == dtype and packed.astype(np.int64).tolist() == numbers.tolist()
        assert _cast(packed, kind, wide).tolist() == numbers.tolist()


@cache
def _session(source: str, target: str) -> Any:
    x, y = (
        helper.make_tensor_value_info(name, getattr(TensorProto, kind.upper()), ["N"])
        for name, kind in (("x", source), ("y", target))
    )
    node = helper.make_node("Cast", ["x"], ["y"], to=getattr(TensorProto, target.upper()))
    made = helper.make_graph([node], "cast", [x], [y])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    return import_runtime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _cast(array: np.ndarray[Any, Any], source: str, target: str) -> np.ndarray[Any, Any]:
    binding = _session(source, target).io_binding()
    low_precision.bind(binding, "x", array)
    binding.bind_output("y", "cpu")
    _session(source, target).run_with_iobinding(binding)
    return low_precision.array_of(binding.get_outputs()[0])
