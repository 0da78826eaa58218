"""Pure: the column that says which rows are steps of one sequence."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pyarrow as pa

from storage.errors import InvalidInput


def check_type(name: str, kind: pa.DataType) -> None:
    """Raise :class:`~storage.errors.InvalidInput` for a column whose values do not name sequences."""
    held: Any = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    held = held.value_type if pa.types.is_dictionary(held) else held
    if not (pa.types.is_integer(held) or _is_text(held) or _is_bytes(held)):
        raise InvalidInput(
            f"column {name!r} is {kind}; a sequence is named by a whole number, a text or bytes", field="sequence"
        )


def keys_of(column: Any) -> list[Hashable]:
    """The name of each row's sequence; ``None`` where it is null. Text is told by its bytes, UTF-8 or not."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    found: list[Hashable] = column.to_pylist()
    return found


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: Any) -> bool:
    is_ = pa.types
    return any(is_one(kind) for is_one in (is_.is_binary, is_.is_large_binary, is_.is_binary_view)) or (
        is_.is_fixed_size_binary(kind)
    )
