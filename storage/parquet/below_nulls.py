"""What an Arrow array holds below its nulls, which is nobody's value, and may be no value at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


def masked(column: Any) -> Any:
    """The same values, with nothing but nulls below nulls: in the fields of a null struct, and in null lists."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, masked(column.storage))
    if pa.types.is_struct(kind) and kind.num_fields:
        fields = [masked(child) for child in column.flatten()]
        return pa.StructArray.from_arrays(fields, fields=list(kind), mask=column.is_null())
    if pa.types.is_fixed_size_list(kind) and kind.list_size:
        return _fixed(column)
    if pa.types.is_map(kind):
        return _map(column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32() if pa.types.is_list(kind) else pa.int64())
        return type(column).from_arrays(offsets, masked(column.flatten()), type=kind, mask=column.is_null())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        wide = pa.int32() if pa.types.is_list_view(kind) else pa.int64()
        starts = pa.array(np.cumsum(lengths) - lengths, wide)
        values = masked(column.flatten())
        return type(column).from_arrays(starts, pa.array(lengths, wide), values, type=kind, mask=column.is_null())
    return column


def _fixed(column: Any) -> Any:
    size = column.type.list_size
    slots = np.arange(len(column) * size) + column.offset * size
    values = masked(column.values.take(pa.array(slots, mask=np.repeat(_nulls(column), size))))
    return pa.FixedSizeListArray.from_arrays(values, type=column.type, mask=column.is_null())


def _map(column: Any) -> Any:
    offsets = column.offsets.to_numpy()
    lengths = np.where(_nulls(column), 0, np.diff(offsets))
    ends = np.cumsum(lengths)
    # Where each pair was: a null map may have some.
    slots = pa.array(np.arange(ends[-1] if len(ends) else 0) + np.repeat(offsets[:-1] - (ends - lengths), lengths))
    keys, items = masked(column.keys.take(slots)), masked(column.items.take(slots))
    starts = pa.array(np.append(0, ends), pa.int32())
    made: Any = pa.MapArray
    return made.from_arrays(starts, keys, items, type=column.type, mask=column.is_null())


def _nulls(column: Any) -> npt.NDArray[np.bool_]:
    return np.asarray(column.is_null().to_numpy(zero_copy_only=False), bool)
