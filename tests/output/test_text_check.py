"""Text that is not UTF-8 becomes null, cell by cell, in columns of any type that holds text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.output.text_check import without_broken

RAW = pa.array([b"good", b"caf\xe9", None, b"h\xed\xa0\xbd", b"fine"]).view(pa.string())
WANTED = ["good", None, None, None, "fine"]
BROKEN = [False, True, False, True, False]


def columns() -> dict[str, tuple[Any, list[Any]]]:
    rows = pa.array(range(5), pa.int32())
    large = pa.array(RAW.cast(pa.binary()).to_pylist(), pa.large_binary()).view(pa.large_string())
    each = pa.array([0, 1, 2, 3, 4, 5], pa.int32())
    listed = [None if broken else [text] for text, broken in zip(WANTED, BROKEN, strict=True)]
    return {
        "string": (RAW, WANTED),
        "large_string": (large, WANTED),
        "dictionary": (pa.DictionaryArray.from_arrays(rows, RAW), WANTED),
        "list": (pa.ListArray.from_arrays(each, RAW), listed),
        "list of dictionaries": (pa.ListArray.from_arrays(each, pa.DictionaryArray.from_arrays(rows, RAW)), listed),
        "struct": (
            pa.StructArray.from_arrays([rows, RAW], ["n", "t"]),
            [None if broken else {"n": n, "t": WANTED[n]} for n, broken in enumerate(BROKEN)],
        ),
        "json": (pa.ExtensionArray.from_storage(pa.json_(pa.string()), RAW), WANTED),
    }


@pytest.mark.parametrize("kind", list(columns()))
def test_broken_cells_are_null_and_told(kind: str) -> None:
    column, wanted = columns()[kind]
    chunks = pa.chunked_array([column, column.slice(1, 2), column.slice(4)])
    cleaned, mask = without_broken(chunks)
    cleaned.validate(full=True)
    assert cleaned.type == column.type
    assert cleaned.to_pylist() == [*wanted, *wanted[1:3], *wanted[4:]]
    assert mask is not None and mask.tolist() == [*BROKEN, *BROKEN[1:3], *BROKEN[4:]]


@pytest.mark.parametrize(
    "column",
    [pa.array(["a", None]), pa.array([b"\xff"]), pa.array([1.5]), pa.array([[b"\xff"]]), pa.array([], pa.string())],
)
def test_columns_without_broken_text_stay(column: Any) -> None:
    chunks = pa.chunked_array([column])
    cleaned, mask = without_broken(chunks)
    assert cleaned is chunks and mask is None


def test_one_broken_row_among_many() -> None:
    texts = np.array(["x"] * 10_000, object)
    raw = [text.encode() for text in texts]
    raw[7_777] = b"\xff"
    cleaned, mask = without_broken(pa.chunked_array([pa.array(raw).view(pa.string())]))
    assert mask is not None and np.flatnonzero(mask).tolist() == [7_777]
    assert cleaned.null_count == 1
