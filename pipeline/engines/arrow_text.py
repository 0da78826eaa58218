"""Text in Arrow columns, whatever type a file keeps it in."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def is_text(kind: pa.DataType) -> bool:
    """True for strings and bytes: plain, large, view or of a fixed size."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or is_bytes(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """True for bytes: plain, large, view or of a fixed size."""
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def values(column: pa.Array[Any]) -> list[Any]:
    """One Python value for each row: ``str``, ``int``, ``float``, ``bool``, a list of messages, ``bytes`` that are not
    UTF-8, or ``None``. Dates, times and decimals become text as Arrow writes them."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return values(column.cast(kind.value_type))
    if isinstance(kind, pa.JsonType):
        return values(column.storage)  # type: ignore[attr-defined]
    if is_text(kind):
        try:
            found = column.to_pylist()
        except UnicodeDecodeError:
            # Parquet does not promise that a string column is UTF-8.
            found = column.cast(pa.large_binary()).to_pylist()
        return [_decoded(value) if isinstance(value, bytes) else value for value in found]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return column.to_pylist()
    if pa.types.is_nested(kind):
        return plain(column)
    if pa.types.is_null(kind):
        return [None] * len(column)
    return pc.cast(column, pa.large_string()).to_pylist()


def plain(column: pa.Array[Any]) -> list[Any]:
    """Python's values, with ``bytes`` in place of a value that holds a string that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(item) for item in column]


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object
