"""Cells whose text is not UTF-8, which other readers could not open the output with. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.parquet.arrow_schemas import changed
from storage.parquet.nested_arrays import cast

Mask = npt.NDArray[np.bool_]


def without_broken(column: pa.ChunkedArray[Any]) -> tuple[pa.ChunkedArray[Any], Mask | None]:
    """The column with null for every cell that holds text which is not UTF-8, at any depth; and which those were.

    The mask is ``bool [n]``, ``None`` where all text is fine.
    """
    if not _holds_text(column.type) or all(map(_is_valid, column.chunks)):
        return column, None
    masks, chunks = [], []
    for chunk in column.chunks:
        plain = cast(chunk, changed(chunk.type, _by_row))
        mask = np.zeros(len(chunk), dtype=np.bool_)
        _mark(plain, 0, mask)
        rows = pa.array(np.arange(len(chunk)), mask=mask)
        chunks.append(cast(plain.take(rows), chunk.type))
        masks.append(mask)
    return pa.chunked_array(chunks, type=column.type), np.concatenate(masks)


@lru_cache
def _holds_text(kind: Any) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_text(kind.storage_type)
    if isinstance(kind, pa.DictionaryType):
        return _holds_text(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return True
    return any(_holds_text(kind.field(at).type) for at in range(kind.num_fields))


def _by_row(kind: Any) -> Any:
    """Without dictionaries and list views: what a row refers to is what all rows do, and one broken text would spoil
    them all."""
    if pa.types.is_list_view(kind):
        return pa.list_(kind.value_field)
    if pa.types.is_large_list_view(kind):
        return pa.large_list(kind.value_field)
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_valid(chunk: Any) -> bool:
    try:
        chunk.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _mark(chunk: Any, first: int, mask: Mask) -> None:
    """Set ``mask`` for the broken rows of ``chunk``, which begins at row ``first``."""
    # Taken, not sliced: of a slice of lists, all values are looked at.
    if _is_valid(chunk.take(pa.array(range(len(chunk)), pa.int64()))):
        return
    if len(chunk) == 1:
        mask[first] = True
        return
    half = len(chunk) // 2
    _mark(chunk.slice(0, half), first, mask)
    _mark(chunk.slice(half), first + half, mask)
