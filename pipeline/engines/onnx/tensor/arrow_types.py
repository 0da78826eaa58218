"""What an Arrow type holds per row, and whether it converts to what a graph wants without loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engines.onnx.runtime import low_precision


@dataclass(frozen=True, slots=True)
class TensorKind:
    """What an Arrow type holds per row. ``dims`` is ``None`` when the rank may differ between rows; a dimension is
    ``None`` where it may."""

    dtype: np.dtype[Any]
    dims: tuple[int | None, ...] | None

    def __str__(self) -> str:
        shape = "…" if self.dims is None else ", ".join("?" if dim is None else str(dim) for dim in self.dims)
        return f"{'string' if self.dtype == np.object_ else self.dtype.name}[{shape}]"


def tensor_kind(kind: Any) -> TensorKind | None:
    """What a column of this type holds per row, or ``None`` when it holds no tensors."""
    if isinstance(kind, pa.FixedShapeTensorType):
        leaf = tensor_kind(kind.value_type)
        order = kind.permutation or range(len(kind.shape))
        return leaf and TensorKind(leaf.dtype, tuple(int(kind.shape[axis]) for axis in order))
    if pa.types.is_dictionary(kind):
        return tensor_kind(kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        inner = tensor_kind(kind.value_type)
        return inner and (TensorKind(inner.dtype, (kind.list_size, *inner.dims)) if inner.dims is not None else None)
    if is_list(kind):
        inner = tensor_kind(kind.value_type)
        return inner and (TensorKind(inner.dtype, (None, *inner.dims)) if inner.dims is not None else None)
    if pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {"shape", "data"}:
        shape, data = tensor_kind(kind.field("shape").type), tensor_kind(kind.field("data").type)
        if shape and data and shape.dims and data.dims and shape.dtype.kind in "iu" and len(data.dims) == 1:
            return TensorKind(data.dtype, None)
        return None
    if pa.types.is_boolean(kind):
        return TensorKind(np.dtype(np.bool_), ())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return TensorKind(np.dtype(kind.to_pandas_dtype()), ())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return TensorKind(np.dtype(np.object_), ())
    return None


def turned_around(kind: Any) -> bool:
    """True for tensors whose permutation is not its own inverse, as of NHWC seen as NCHW.

    The specification and ``from_numpy_ndarray`` of pyarrow mean opposite things by it, so nothing tells which order an
    author had in mind; with axes of equal size the tensor would come out turned without a word.
    """
    if pa.types.is_dictionary(kind):
        return turned_around(kind.value_type)
    order = kind.permutation if isinstance(kind, pa.FixedShapeTensorType) else None
    return order is not None and any(order[order[axis]] != axis for axis in range(len(order)))


def is_list(kind: pa.DataType) -> bool:
    """True for lists of any length, views included."""
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def lossless(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """True when every value of ``source`` is exactly one of ``target``.

    For a low-precision target: when every value is one of its carrier (``RowTensors.to_low_precision`` checks the
    values).
    """
    if source == target:
        return True
    if low_precision.is_low_precision(target):
        return lossless(source, low_precision.carrier(target))
    if np.object_ in (source, target) or source.kind == "b" or target.kind == "b":
        return False
    if source.kind in "iu" and target.kind == "f":
        bits = source.itemsize * 8 - (source.kind == "i")
        return bits <= int(np.finfo(target).nmant) + 1
    return np.can_cast(source, target, "safe")
