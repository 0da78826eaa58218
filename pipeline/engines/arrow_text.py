"""Text in Arrow columns, whatever type a file keeps it in, and the kinds of types that hold texts and lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import InvalidInput


def _any(*names: str) -> Callable[[Any], bool]:
    tests = [getattr(pa.types, f"is_{name}") for name in names]
    return lambda kind: any(test(kind) for test in tests)


is_string = _any("string", "large_string", "string_view")
"""True for strings: plain, large or view."""
is_bytes = _any("binary", "large_binary", "binary_view", "fixed_size_binary")
"""True for bytes: plain, large, view or of a fixed size."""
is_list = _any("list", "large_list", "fixed_size_list")
"""True for lists: plain, large or of a fixed size."""


def is_text(kind: Any) -> bool:
    """True for strings and bytes."""
    return is_string(kind) or is_bytes(kind)


def column_type(schema: pa.Schema, name: str, field: str) -> pa.DataType:
    """The type of a column, or of the values of a dictionary. Raises :class:`InvalidInput` unless there is one."""
    found = schema.get_all_field_indices(name)
    if len(found) != 1:
        what = f"{len(found)} columns named" if found else "no column"
        raise InvalidInput(f"the input has {what} {name!r}; it has {', '.join(schema.names) or 'none'}", field=field)
    kind: pa.DataType = schema.field(found[0]).type
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


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
