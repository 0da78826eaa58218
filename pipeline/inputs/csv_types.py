"""Which type a column of a CSV has, by its texts: one that gives every text back as it was written. Pure."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.spec.text_options import DECIMAL

# Python's and Arrow's text of a value is the one that was read, for texts of these forms.
_FORMS: dict[pa.DataType, tuple[str, str | None]] = {
    pa.int64(): (r"^(0|-?[1-9][0-9]{0,18})$", None),
    pa.date32(): (r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", r"^0000"),
    # A double holds 15 digits, and is written with an exponent below 0.0001.
    pa.float64(): (r"^-?(0|[1-9][0-9]*)\.(0|[0-9]*[1-9])$", r"[0-9.]{17}|^-?0\.0000"),
}
"""Type: (the form of its texts, what of that form is excepted)."""
CANDIDATES: tuple[pa.DataType, ...] = tuple(_FORMS)
_NAMED: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}


def named(name: str) -> pa.DataType:
    """The type that a user calls ``name``, which :func:`pipeline.spec.text_options.check_type` has accepted."""
    match = DECIMAL.fullmatch(name)
    return pa.decimal128(int(match[1]), int(match[2])) if match is not None else _NAMED[name]


def comes_back(column: pa.Array[Any], kind: pa.DataType) -> bool:
    """Whether every text of ``column``, as a value of ``kind`` (one of ``CANDIDATES``), is written the same again."""
    form, excepted = _FORMS[kind]
    raw = column.cast(pa.binary())  # which need not be UTF-8
    if not pc.all(pc.match_substring_regex(raw, form), min_count=0).as_py():
        return False
    if excepted is not None and pc.any(pc.match_substring_regex(raw, excepted), min_count=0).as_py():
        return False
    try:
        column.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def parsed(column: pa.Array[Any], kind: pa.DataType) -> pa.Array[Any]:
    """The texts as values of ``kind``. A missing text is null, and empty in a column of text. Raises
    ``pa.ArrowInvalid``."""
    if pa.types.is_string(kind):
        filled: pa.Array[Any] = pc.fill_null(column, "")  # type: ignore[arg-type]
        return filled
    return column.cast(kind)


def first_misfit(column: pa.Array[Any], kind: pa.DataType) -> int | None:
    """The index of the first text that is no value of ``kind``."""
    low, high = 0, len(column)
    if _fits(column, kind):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(column.slice(low, middle - low), kind):
            low = middle
        else:
            high = middle
    return low


def _fits(column: pa.Array[Any], kind: pa.DataType) -> bool:
    try:
        parsed(column, kind)
    except pa.ArrowInvalid:
        return False
    return True
