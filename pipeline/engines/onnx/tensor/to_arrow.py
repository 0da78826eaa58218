"""Stacked results of a graph to Arrow columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engines.onnx.runtime import low_precision
from pipeline.engines.onnx.runtime.signature import Dim
from pipeline.engines.onnx.tensor.row_tensors import Array


def column_type(dtype: np.dtype[Any], dims: Sequence[Dim] | None, *, tensors: bool = False) -> pa.DataType:
    """The Arrow type of a result column whose rows have the shape ``dims``.

    A scalar is a primitive; a vector of a fixed size ``fixed_size_list``, unless ``tensors`` asks for a tensor; a
    fixed shape of numbers ``arrow.fixed_shape_tensor``; anything else (a dynamic or zero size, booleans and strings,
    which that type cannot hand to numpy) nested lists; an open rank ``struct<shape, data>``.
    """
    dtype = low_precision.carrier(dtype)
    leaf: pa.DataType = pa.string() if dtype == np.object_ else pa.from_numpy_dtype(dtype)
    if dims is None:
        return pa.struct([pa.field("shape", pa.list_(pa.int64())), pa.field("data", pa.list_(leaf))])
    if not dims:
        return leaf
    sizes = [dim for dim in dims if isinstance(dim, int) and dim > 0]
    fixed = len(sizes) == len(dims)
    if fixed and dtype.kind in "iuf" and (tensors or len(dims) > 1):
        return pa.fixed_shape_tensor(leaf, sizes)
    if fixed and len(dims) == 1:
        return pa.list_(leaf, sizes[0])
    for _ in dims:
        leaf = pa.list_(leaf)
    return leaf


def to_arrow(stacked: Array, kind: Any) -> Any:
    """Rows, [n, *shape], as a column of a type from :func:`column_type`. Raises ``ValueError`` when they differ."""
    stacked = stacked.astype(low_precision.carrier(stacked.dtype), copy=False)
    n, shape = len(stacked), stacked.shape[1:]
    flat = pa.array(np.ascontiguousarray(stacked).reshape(-1), pa.string() if stacked.dtype == np.object_ else None)
    if isinstance(kind, pa.FixedShapeTensorType):
        if tuple(kind.shape) != shape:
            raise ValueError(f"shape {list(shape)}, declared {list(kind.shape)}")
        size = int(np.prod(shape, dtype=np.int64))
        return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, size))
    if pa.types.is_struct(kind):
        sizes = pa.array(np.tile(np.asarray(shape, np.int64), n))
        size = int(np.prod(shape, dtype=np.int64))
        arrays = [_lists(sizes, n, len(shape)), _lists(flat, n, size)]
        return pa.StructArray.from_arrays(arrays, fields=[kind.field(0), kind.field(1)])
    if pa.types.is_fixed_size_list(kind):
        if shape != (kind.list_size,):
            raise ValueError(f"shape {list(shape)}, declared [{kind.list_size}]")
        return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    rank = 0
    inner = kind
    while pa.types.is_list(inner):
        inner, rank = inner.value_type, rank + 1
    if rank != len(shape):
        raise ValueError(f"{len(shape)} axes, declared {rank}")
    for axis in range(rank - 1, -1, -1):
        flat = _lists(flat, n * int(np.prod(shape[:axis], dtype=np.int64)), shape[axis])
    return flat


def _lists(values: Any, n: int, size: int) -> Any:
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int64) * size, pa.int32()), values)


def retyped(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with its vectors as the tensors that ``schema`` has in their place; nothing is copied."""
    columns: list[Any] = list(batch.columns)
    for at, field in enumerate(schema):
        if columns[at].type != field.type:
            columns[at] = pa.ExtensionArray.from_storage(field.type, columns[at])
    return pa.RecordBatch.from_arrays(columns, schema=schema)
