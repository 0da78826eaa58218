"""How the values of a column become text in a prompt: one form for each Arrow type, the same in every engine.

``docs/how-to/chat.md`` has the table; a test holds it against this module.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipeline.engines.arrow_text import is_bytes, is_list, is_text
from pipeline.spec.error_codes import RowErrorCode
from storage.errors import RowError

pc: Any = pyarrow.compute
"""The stubs lack some of its functions, and refuse plain numbers."""
Column = Any
"""An Arrow array of any type; the stubs know a list's or a struct's members only after a cast to its class."""
Value = Any
"""What a JSON document may hold, or the :class:`RowError` of a value that has no text."""

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
"""Seconds since 1970: the first and the last of the years 1 to 9999."""
_DAY = 86_400
_EXACT = 2.0**24
"""Whole numbers below it are written digit by digit, even where fewer digits would read back as the same float."""


def refusal(kind: pa.DataType) -> str | None:
    """Why values of this type have no text, or ``None``: they have one. For a check at submit."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return refusal(kind.value_type)
    if isinstance(kind, (pa.UuidType, pa.Bool8Type, pa.JsonType)):
        return None
    if isinstance(kind, pa.FixedShapeTensorType):
        return "a tensor has no text of its own; make it a column of lists or of text"
    if isinstance(kind, pa.BaseExtensionType):
        return f"the extension type {kind.extension_name} has no text that is known here; cast the column to string"
    if pa.types.is_struct(kind):
        return next(filter(None, (_inside(kind.field(i).type) for i in range(kind.num_fields))), None)
    if pa.types.is_map(kind):
        if pa.types.is_nested(kind.key_type):
            return "the keys of a map must be plain values to be written as JSON"
        return _inside(kind.key_type) or _inside(kind.item_type)
    if _is_list(kind):
        return _inside(kind.value_type)  # type: ignore[attr-defined]
    if pa.types.is_union(kind):
        return "a union has no text; cast the column to string"
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        try:
            pc.cast(pa.array([0], kind), pa.string())
        except pa.ArrowInvalid:
            return f"this machine does not know the time zone {kind.tz!r}; cast the column to UTC"
    return None


def texts(column: Column, name: str) -> list[str | RowError]:
    """For each row its text, or the error of a row that has none: null, not UTF-8, a date beyond all calendars.

    ``name`` is what messages call the column. The type must be one that :func:`refusal` accepts.
    """
    values = _values(column, name)
    if is_text(column.type) and not column.null_count:
        return cast(list[str | RowError], values)
    found: list[str | RowError] = []
    for value in values:
        if value is None:
            found.append(RowError(RowErrorCode.MISSING_VALUE, f"column {name!r} is null"))
        elif isinstance(value, (str, RowError)):
            found.append(value)
        else:
            found.append(_written(value))
    return found


def _inside(kind: pa.DataType) -> str | None:
    if is_bytes(kind):
        return "bytes within a list or a struct have no text in JSON; cast them to string"
    return refusal(kind)


def _is_list(kind: pa.DataType) -> bool:
    return is_list(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _values(column: Column, name: str) -> list[Value]:
    """The values as JSON has them: what has no form of its own there is text; ``None`` for null."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        each = _values(column.dictionary, name)
        return [None if at is None else each[at] for at in column.indices.to_pylist()]
    if pa.types.is_run_end_encoded(kind):
        return _values(pc.run_end_decode(column), name)
    if isinstance(kind, pa.BaseExtensionType):
        return _extension(column, name)
    if pa.types.is_null(kind):
        return [None] * len(column)
    if is_text(kind):
        return _strings(column, name)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_float64(kind):
        return column.to_pylist()  # type: ignore[no-any-return]
    if pa.types.is_floating(kind):
        return _floats(column)
    if pa.types.is_decimal(kind):
        return [None if value is None else format(value, "f") for value in column.to_pylist()]
    if pa.types.is_temporal(kind):
        return _times(column, name)
    if pa.types.is_struct(kind):
        return _objects(column, name)
    return _pairs(column, name) if pa.types.is_map(kind) else _lists(column, name)


def _extension(column: Column, name: str) -> list[Value]:
    if isinstance(column.type, pa.UuidType):
        return [None if raw is None else str(uuid.UUID(bytes=raw)) for raw in column.storage.to_pylist()]
    if isinstance(column.type, pa.Bool8Type):
        return [None if value is None else value != 0 for value in column.storage.to_pylist()]
    return _values(column.storage, name)


def _strings(column: Column, name: str) -> list[Value]:
    if not is_bytes(column.type):
        try:
            return column.to_pylist()  # type: ignore[no-any-return]
        except UnicodeDecodeError:
            pass  # Parquet does not promise that a string column is UTF-8.
    found: list[Value] = []
    for raw in column.cast(pa.large_binary()).to_pylist():
        try:
            found.append(None if raw is None else raw.decode())
        except UnicodeDecodeError as error:
            why = f"column {name!r} is not UTF-8: {error.reason} at byte {error.start}"
            found.append(RowError(RowErrorCode.INVALID_UTF8, why))
    return found


def _floats(column: Column) -> list[Value]:
    """Numbers of 16 or 32 bits as Python's floats of the fewest digits that read back as the same number."""
    numbers = column.drop_null().to_numpy(zero_copy_only=False)
    pairs = zip(numbers.astype(np.float64).tolist(), numbers, strict=True)
    short = iter([wide if abs(wide) < _EXACT and wide.is_integer() else float(str(v)) for wide, v in pairs])
    return [next(short) if valid else None for valid in column.is_valid().to_pylist()]


def _times(column: Column, name: str) -> list[Value]:
    kind = column.type
    if pa.types.is_duration(kind):
        scale = _PER_SECOND[kind.unit]
        counts = column.cast(pa.int64()).to_pylist()
        return [None if n is None else _sign(n) + f"PT{_seconds(abs(n), scale)}S" for n in counts]
    if pa.types.is_interval(kind):
        return [None if gap is None else _interval(gap) for gap in column.to_pylist()]
    wide = pa.int32() if kind.bit_width == 32 else pa.int64()
    counts = column.view(wide).cast(pa.int64())
    if pa.types.is_time(kind):
        low, high = 0, _DAY * _PER_SECOND[kind.unit] - 1
    elif pa.types.is_timestamp(kind):
        scale = _PER_SECOND[kind.unit]
        low, high = _FIRST_SECOND * scale, (_LAST_SECOND + 1) * scale - 1
    else:
        per_day = 1 if pa.types.is_date32(kind) else _DAY * 1000
        low, high = _FIRST_SECOND // _DAY * per_day, (_LAST_SECOND // _DAY + 1) * per_day - 1
    most = 2**63
    outside = pc.or_(pc.less(counts, max(low, -most)), pc.greater(counts, min(high, most - 1)))
    kept = column.filter(pc.and_kleene(pc.invert(outside), column.is_valid()))
    written = iter(pc.cast(kept, pa.large_string()).to_pylist())
    found: list[Value] = []
    for count, bad in zip(counts.to_pylist(), outside.to_pylist(), strict=True):
        text = None if bad or count is None else next(written)
        # A zone may carry a time at the edge of the calendar across it.
        if count is not None and (text is None or not (text[2] == ":" or (text[4] == "-" and text[:4] != "0000"))):
            span = "a day" if pa.types.is_time(kind) else "the years 1 to 9999"
            why = f"column {name!r} holds {count} as {kind}, which is no time of {span}"
            found.append(RowError(RowErrorCode.INVALID_VALUE, why))
        else:
            found.append(text)
    return found


def _sign(n: int) -> str:
    return "-" if n < 0 else ""


def _seconds(n: int, scale: int) -> str:
    """``n`` parts of a second as seconds, without zeros at the end."""
    whole, rest = divmod(n, scale)
    return f"{whole}" + (f".{rest:0{len(str(scale)) - 1}d}".rstrip("0") if rest else "")


def _interval(gap: Any) -> str:
    """Months, days and nanoseconds in ISO 8601's form, each with its own sign."""
    parts = [f"{gap.months}M" if gap.months else "", f"{gap.days}D" if gap.days else ""]
    n = gap.nanoseconds
    clock = f"T{_sign(n)}{_seconds(abs(n), 10**9)}S" if n or not any(parts) else ""
    return "P" + "".join(parts) + clock


def _held(items: Sequence[Value], make: Callable[[Sequence[Value]], Value], name: str) -> Value:
    """A list or an object of the items, or the error of the first of them that has no text."""
    for item in items:
        if isinstance(item, RowError):
            return item
        if isinstance(item, float) and not np.isfinite(item):
            return RowError(
                RowErrorCode.INVALID_VALUE,
                f"column {name!r} holds {item} within a list or a struct, and JSON has no such number",
            )
    return make(items)


def _objects(column: Column, name: str) -> list[Value]:
    names = [column.type.field(i).name for i in range(column.type.num_fields)]
    fields = [_values(field, name) for field in column.flatten()]
    rows = zip(*fields, strict=True) if fields else iter([()] * len(column))
    return [
        _held(row, lambda items: dict(zip(names, items, strict=True)), name) if valid else None
        for row, valid in zip(rows, column.is_valid().to_pylist(), strict=True)
    ]


def _lists(column: Column, name: str) -> list[Value]:
    inner = _values(column.flatten(), name)  # without what lies below null rows
    found, at = [], 0
    for size in pc.list_value_length(column).to_pylist():
        found.append(None if size is None else _held(inner[at : at + size], list, name))
        at += size or 0
    return found


def _pairs(column: Column, name: str) -> list[Value]:
    offsets = column.offsets.to_pylist()
    low, size = offsets[0], offsets[-1] - offsets[0]
    keys = texts(column.keys.slice(low, size), name)
    items = _values(column.items.slice(low, size), name)
    found = []
    for start, end, valid in zip(offsets, offsets[1:], column.is_valid().to_pylist(), strict=False):
        here = slice(start - low, end - low)
        both = [*keys[here], *items[here]]
        found.append(_held(both, _halves, name) if valid else None)
    return found


def _halves(items: Sequence[Value]) -> dict[str, Value]:
    middle = len(items) // 2
    return dict(zip(items[:middle], items[middle:], strict=True))
