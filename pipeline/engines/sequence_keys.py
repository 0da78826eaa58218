"""Pure: the column that says which rows are steps of one sequence."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pyarrow as pa

from pipeline.engines.arrow_text import is_string, is_text
from storage.errors import InvalidInput


def check_type(name: str, kind: pa.DataType) -> None:
    """Raise :class:`~storage.errors.InvalidInput` for a column whose values do not name sequences."""
    held: Any = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    held = held.value_type if pa.types.is_dictionary(held) else held
    if not (pa.types.is_integer(held) or is_text(held)):
        raise InvalidInput(
            f"column {name!r} is {kind}; a sequence is named by a whole number, a text or bytes", field="sequence"
        )


def keys_of(column: Any) -> list[Hashable]:
    """The name of each row's sequence; ``None`` where it is null. Text is told by its bytes, UTF-8 or not."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_string(column.type):
        column = column.cast(pa.large_binary())
    found: list[Hashable] = column.to_pylist()
    return found
