"""Nested arrays rebuilt: masked, what is no value is gone; cast, every value is as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage.parquet.nested_arrays import cast, cast_batch, masked

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


SECONDS, MILLIS = pa.timestamp("s"), pa.timestamp("ms")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.nulls(2), pa.list_view(pa.list_(pa.int8()))),
        (pa.array([None], pa.decimal32(7, 2)), pa.list_view(pa.int8())),
        (pa.array([[None] * 3, [], None], pa.list_(pa.null())), pa.list_(pa.int8())),
        (pa.array([[1], None, [None, 2]], pa.list_(pa.int8())), pa.list_view(pa.int16())),
        (pa.array([[1], None, [None, 2]], pa.list_view(pa.int8())), pa.large_list(pa.int8())),
        (pa.array([[1, 2], None, [None, 3]], pa.list_(pa.int8(), 2)), pa.list_(pa.int64())),
        (pa.array([[1, 2], None, [None, 3]], pa.list_(pa.int8(), 2)), pa.list_(pa.int64(), 2)),
        (
            pa.array(
                [{"a": [None, None], "b": None}, None], pa.struct([("a", pa.list_(pa.null())), ("b", pa.date32())])
            ),
            pa.struct([("b", pa.date32()), ("more", pa.string()), ("a", pa.list_(pa.null()))]),
        ),
        (pa.array([[("c", None)], None, []], pa.map_(pa.string(), pa.null())), pa.map_(pa.large_string(), pa.int8())),
        (pa.array(["{}", None]), pa.json_()),
        (pa.array(["{}", None], pa.json_()), pa.string()),
        (pa.chunked_array([pa.array([["x"]], pa.list_(WORDS)), pa.array([], pa.list_(WORDS))]), pa.list_(pa.string())),
    ],
    ids=lambda given: str(getattr(given, "type", given))[:30],
)
def test_a_cast_keeps_every_value(column: Any, kind: Any) -> None:
    for part in (column, column.slice(1), column.slice(0, 1)):
        found = cast(part, kind)
        found.validate(full=True)
        assert (found.type, _present(found)) == (kind, _present(part))


def test_columns_of_a_struct_are_cast_beside_lists_of_nulls() -> None:
    kind = pa.struct([("a", pa.list_(pa.null())), ("b", SECONDS)])
    table = pa.table({"c": pa.array([{"a": [None, None], "b": 1}, {"a": [], "b": None}], kind)})
    wanted = pa.schema([("c", pa.struct([("a", pa.list_(pa.null())), ("b", MILLIS)]))])
    found = cast_batch(table, wanted)
    found.validate(full=True)
    assert (found.schema, found.to_pylist()) == (wanted, table.to_pylist())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(pa.ArrowInvalid):
        cast(pa.array([[300]]), pa.list_(pa.int8()))


def _present(column: Any) -> list[Any]:
    rows = column.to_pylist()
    return [
        {name: item for name, item in row.items() if item is not None} if isinstance(row, dict) else row for row in rows
    ]


@pytest.mark.parametrize("ends", [[0, 5, 1], [0, -1, 1]])
def test_offsets_that_lead_out_of_their_list_are_not_followed(ends: list[int]) -> None:
    values, offsets = pa.array(["x"]), pa.py_buffer(np.array(ends, np.int32).tobytes())
    for kind in (pa.list_(pa.string()), pa.map_(pa.string(), pa.string())):
        child = values if pa.types.is_list(kind) else pa.StructArray.from_arrays([values] * 2, ["key", "value"])
        with pytest.raises(pa.ArrowInvalid, match="lead out"):
            masked(pa.Array.from_buffers(kind, 2, [None, offsets], children=[child]))
