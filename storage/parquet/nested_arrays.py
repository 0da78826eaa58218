"""Nested Arrow arrays rebuilt from the inside out: cast where Arrow cannot, or without what lies below nulls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_NESTED = (
    *(pa.StructType, pa.MapType, pa.ListType, pa.LargeListType, pa.FixedSizeListType),
    *(pa.ListViewType, pa.LargeListViewType),
)


def cast(column: Any, kind: Any) -> Any:
    """The column (an array, or one in chunks) as ``kind``. Raises ``pa.ArrowInvalid`` where a value does not fit.

    Arrow's own cast breaks lists of nulls, also to their own type, and makes no list view out of anything.
    """
    if column.type == kind:
        return column
    if isinstance(column, pa.ChunkedArray):
        return pa.chunked_array([cast(chunk, kind) for chunk in column.chunks], kind)
    if column.null_count == len(column):
        return pa.nulls(len(column), kind)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, cast(column, kind.storage_type))
    if isinstance(column, pa.ExtensionArray):
        return cast(column.storage, kind)
    if _is_nested(column.type) and _is_nested(kind):
        return _rebuilt(column, kind, cast)
    if isinstance(column, pa.DictionaryArray) and not pa.types.is_dictionary(kind):
        return cast(column.dictionary, kind).take(column.indices)
    if pa.types.is_dictionary(kind) and not isinstance(column, pa.DictionaryArray):
        return column.dictionary_encode().cast(kind)
    return column.cast(kind)


def cast_batch(batch: Any, schema: pa.Schema) -> Any:
    """The record batch or table with its columns, in the same order, as ``schema`` has them. Raises what :func:`cast`
    does."""
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    columns = [cast(column, kind) for column, kind in zip(batch.columns, schema.types, strict=True)]
    return type(batch).from_arrays(columns, schema=schema)


class _Buffers:
    """What Arrow's C data interface hands over, under another type or schema."""

    def __init__(self, found: Any, kind: Any) -> None:
        self._found, self._kind = found, kind

    def __arrow_c_array__(self, requested_schema: object = None) -> tuple[object, object]:
        return self._kind.__arrow_c_schema__(), self._found.__arrow_c_array__()[1]


def with_types(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch's buffers, uncopied, as columns of types of the same layout: text as bytes, for instance."""
    found: Any = _Buffers(batch, schema)
    return pa.record_batch(found)


def masked(column: Any) -> Any:
    """The same values, with nothing but nulls below nulls: in the fields of a null struct, and in null lists.

    What lies there is nobody's value, and may be no value at all. Raises ``pa.ArrowInvalid`` for offsets that lead out
    of the values of a list: Arrow follows them wherever they lead.
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, masked(column.storage))
    if not _is_nested(kind):
        return column
    _check_offsets(column)
    return _rebuilt(column, kind, lambda child, _: masked(child))


def _check_offsets(column: Any) -> None:
    if not hasattr(column, "offsets"):
        return
    starts = column.offsets.to_numpy().astype(np.int64)
    if hasattr(column, "sizes"):
        ends = starts + column.sizes.to_numpy()
    else:
        starts, ends = starts[:-1], starts[1:]
    if np.any(starts < 0) or np.any(ends < starts) or np.any(ends > len(column.values)):
        raise pa.ArrowInvalid("the offsets of a list lead out of its values")


def _is_nested(kind: Any) -> bool:
    return isinstance(kind, _NESTED) and kind.num_fields > 0


def _rebuilt(column: Any, kind: Any, child: Callable[[Any, Any], Any]) -> Any:
    """An array of the nested type ``kind`` from the children of ``column``, each by ``child(values, type)``.

    A field of a struct that ``column`` does not have is null.
    """
    if pa.types.is_struct(kind):
        names = [column.type.field(at).name for at in range(column.type.num_fields)]
        found = column.flatten()
        if names == [item.name for item in kind]:
            fields = [child(values, item.type) for values, item in zip(found, kind, strict=True)]
        else:
            by_name = dict(zip(names, found, strict=True))
            none = pa.nulls(len(column))
            fields = [child(by_name.get(item.name, none), item.type) for item in kind]
        return pa.StructArray.from_arrays(fields, fields=list(kind), mask=column.is_null())
    if pa.types.is_map(kind):
        return _map(column, kind, child)
    if pa.types.is_fixed_size_list(kind) and kind.list_size:
        slots = np.arange(len(column) * kind.list_size) + column.offset * kind.list_size
        missing = np.repeat(_nulls(column), kind.list_size)
        values = child(column.values.take(pa.array(slots, mask=missing)), kind.value_type)
        made: Any = pa.FixedSizeListArray
        return made.from_arrays(values, type=kind, mask=column.is_null())
    if pa.types.is_fixed_size_list(kind):
        return column
    return _list(column, kind, child(column.flatten(), kind.value_type))


def _list(column: Any, kind: Any, values: Any) -> Any:
    """A list of any kind but of a fixed size, of ``values``, which are those of ``column`` one after another."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    wide = pa.int64() if large else pa.int32()
    made: Any
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        made = pa.LargeListArray if large else pa.ListArray
        places = [pa.array(np.append(0, ends), wide)]
    else:
        made = pa.LargeListViewArray if large else pa.ListViewArray
        places = [pa.array(ends - lengths, wide), pa.array(lengths, wide)]
    return made.from_arrays(*places, values, type=kind, mask=column.is_null())


def _map(column: Any, kind: Any, child: Callable[[Any, Any], Any]) -> Any:
    offsets = column.offsets.to_numpy()
    lengths = np.where(_nulls(column), 0, np.diff(offsets))
    ends = np.cumsum(lengths)
    # Where each pair was: a null map may have some.
    slots = pa.array(np.arange(ends[-1] if len(ends) else 0) + np.repeat(offsets[:-1] - (ends - lengths), lengths))
    keys, items = child(column.keys.take(slots), kind.key_type), child(column.items.take(slots), kind.item_type)
    made: Any = pa.MapArray
    return made.from_arrays(pa.array(np.append(0, ends), pa.int32()), keys, items, type=kind, mask=column.is_null())


def _nulls(column: Any) -> npt.NDArray[np.bool_]:
    return np.asarray(column.is_null().to_numpy(zero_copy_only=False), bool)
