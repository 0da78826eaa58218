"""Below a null may lie what is no value at all; masked, it is gone and every value is as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage.parquet.below_nulls import masked

NONE = pa.DictionaryArray.from_arrays(pa.array([0] * 4, pa.int8()), pa.array([], pa.string()), safe=False)
"""Indices into no category at all."""
NULLS = pa.array([True, True])
OFFSETS = [0, 2, 4]
KEYS = pa.array(list("abcd"))
WORDS = pa.dictionary(pa.int8(), pa.string())
PAIRS = pa.list_(WORDS, 2)


@pytest.mark.parametrize(
    "column",
    [
        pa.StructArray.from_arrays([NONE.slice(2)], ["a"], mask=NULLS),
        pa.FixedSizeListArray.from_arrays(NONE, 2, mask=NULLS),
        pa.ListArray.from_arrays(pa.array(OFFSETS, pa.int32()), NONE, mask=NULLS),
        pa.LargeListArray.from_arrays(pa.array(OFFSETS, pa.int64()), NONE, mask=NULLS),
        pa.ListViewArray.from_arrays(pa.array([0, 2], pa.int32()), pa.array([2, 2], pa.int32()), NONE, mask=NULLS),
        pa.MapArray.from_arrays(pa.array(OFFSETS, pa.int32()), KEYS, NONE, mask=NULLS),
    ],
    ids=lambda column: str(column.type).split("<")[0],
)
def test_what_is_no_value_is_gone(column: Any) -> None:
    with pytest.raises(pa.ArrowInvalid):
        column.validate(full=True)
    found = masked(column)
    found.validate(full=True)
    assert (found.type, found.to_pylist()) == (column.type, [None, None])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, {"a": None}, {"a": ["x", "y"]}], pa.struct([("a", PAIRS)])),
        pa.array([None, [None, {"a": ["x", "y"]}], [{"a": None}, None]], pa.list_(pa.struct([("a", PAIRS)]), 2)),
        *(
            pa.array([["z"], None, ["x", None], [], ["y"]], kind(WORDS))
            for kind in (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)
        ),
        pa.array([[("c", "z")], None, [("a", "x"), ("b", None)], []], pa.map_(pa.string(), WORDS)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(3, 2, 2)),
        pa.array([{}, None], pa.struct([])),
        pa.array([], pa.map_(pa.string(), WORDS)),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_every_value_is_as_it_was(column: Any) -> None:
    for part in (column, column.slice(1), column.slice(0, 1)):
        found = masked(part)
        found.validate(full=True)
        assert (found.type, found.to_pylist()) == (part.type, part.to_pylist())
