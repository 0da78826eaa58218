"""Arrow columns to the tensors of their rows.

Traps that this file deals with: ``FixedSizeListArray.flatten`` drops nulls, ``values`` ignores the slice, booleans are
packed into bits, ``to_numpy`` turns integers with nulls into floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.engines.onnx.tensor.arrow_types import is_list
from pipeline.engines.onnx.tensor.row_tensors import NO_AXIS, UNKNOWN, Array, Failure, Indices, RowTensors
from pipeline.spec.error_codes import RowErrorCode

Column = Any
"""An Arrow array of any type; the stubs know a list's or a struct's members only after a cast to its class."""

MOST_AXES = 63
"""numpy's arrays have 64 axes at most, and rows are stacked along one of them."""
MOST_BYTES = 2.0**47
"""No address space holds more, nor does numpy count past 2**63 bytes: this leaves room for 65,536 stacked rows."""


def read(column: Column, rank: int | None, name: str, *, unit: bool = False) -> RowTensors:
    """The rows of a column as tensors of ``rank`` axes; ``name`` is what messages call the input.

    Without a ``rank`` each row keeps its own. With ``unit``, a row of ``struct<shape, data>`` may have one axis more,
    of size one, in front; it is dropped.

    Row failures: ``missing_value`` for a null row or a null within one, ``wrong_shape`` for another rank and for lists
    of unequal lengths within a row, ``invalid_utf8``, ``invalid_value`` for a shape that does not match its data.
    """
    permutation = None
    if isinstance(column.type, pa.FixedShapeTensorType):
        permutation = tuple(column.type.permutation) if column.type.permutation else None
        sizes = np.asarray(column.type.shape, dtype=np.int64)
        valid = _valid(column)
        storage = column.storage
        rows = _layout(storage)
        if permutation:
            sizes = sizes[list(permutation)]
        rows = _Layout(rows.flat, rows.starts, np.tile(sizes, (len(column), 1)), rows.bad)
    elif pa.types.is_struct(column.type):
        return _shaped(column, rank, name, unit=unit)
    else:
        valid = _valid(column)
        rows = _layout(column)
    axes, n = rows.shapes.shape[1], len(column)
    if axes != rank and (rank is not None or axes > MOST_AXES):
        failures = dict.fromkeys(range(n), _wrong_rank(name, axes, rank))
        return RowTensors(rows.flat, rows.starts, np.zeros((n, rank or 0), np.int64), failures)
    made = RowTensors(rows.flat, rows.starts, rows.shapes, _failures(rows.bad, valid, name), permutation)
    _addressable(made, name)
    return made


def _wrong_rank(name: str, axes: int, rank: int | None) -> Failure:
    wanted = f"; {MOST_AXES} at most" if rank is None else f", the graph wants {rank}"
    return RowErrorCode.WRONG_SHAPE, f"{name}: the row has {axes} axes{wanted}"


_NULL_INSIDE, _RAGGED, _NOT_UTF8 = 1, 2, 4


@dataclass(frozen=True, slots=True)
class _Layout:
    flat: Array
    starts: Indices
    shapes: Indices
    bad: npt.NDArray[np.uint8]
    """Bits of what is wrong within the row."""


def _failures(bad: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_], name: str) -> dict[int, Failure]:
    failures: dict[int, Failure] = {}
    for row in np.flatnonzero(~valid | (bad != 0)):
        if not valid[row]:
            failures[int(row)] = (RowErrorCode.MISSING_VALUE, f"{name} is null")
        elif bad[row] & _NULL_INSIDE:
            failures[int(row)] = (RowErrorCode.MISSING_VALUE, f"{name} has a null among its elements")
        elif bad[row] & _NOT_UTF8:
            failures[int(row)] = (RowErrorCode.INVALID_UTF8, f"{name} has a string that is not UTF-8")
        else:
            message = f"{name}: the row's lists have unequal lengths, so it is no tensor"
            failures[int(row)] = (RowErrorCode.WRONG_SHAPE, message)
    return failures


def _valid(column: Column) -> npt.NDArray[np.bool_]:
    return np.asarray(column.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _layout(column: Column) -> _Layout:
    kind = column.type
    n = len(column)
    if pa.types.is_dictionary(kind):
        return _layout(column.cast(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        inner = _layout(column.values.slice(column.offset * size, n * size))
        offsets = np.arange(n + 1, dtype=np.int64) * size
    elif pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        sizes = np.where(_valid(column), np.asarray(column.sizes), 0)
        inner = _layout(column.flatten())
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    elif is_list(kind):
        absolute = np.asarray(column.offsets).astype(np.int64)
        low, high = (int(absolute[0]), int(absolute[-1])) if n else (0, 0)
        inner = _layout(column.values.slice(low, high - low))
        offsets = absolute - low if n else np.zeros(1, np.int64)
    else:
        return _leaf(column)
    lengths = np.diff(offsets)
    some = lengths > 0
    first = np.where(some, offsets[:-1], 0)
    shapes = np.full((n, inner.shapes.shape[1] + 1), UNKNOWN, dtype=np.int64)
    shapes[:, 0] = lengths
    starts = np.zeros(n, dtype=np.int64)
    shapes[some, 1:] = inner.shapes[first[some]]
    starts[some] = inner.starts[first[some]]
    bad = np.where(_valid(column), 0, _NULL_INSIDE).astype(np.uint8)
    for bit in (_NULL_INSIDE, _RAGGED, _NOT_UTF8):
        bad |= np.where(_any_between((inner.bad & bit) != 0, offsets[:-1], offsets[1:]), bit, 0).astype(np.uint8)
    changes = (inner.shapes[1:] != inner.shapes[:-1]).any(axis=1)  # [j]: elements j and j + 1 differ in shape
    ragged = some & _any_between(changes, np.minimum(offsets[:-1], len(changes)), np.maximum(offsets[1:] - 1, 0))
    bad |= np.where(ragged, _RAGGED, 0).astype(np.uint8)
    return _Layout(inner.flat, starts, shapes, bad)


def _any_between(flags: npt.NDArray[np.bool_], low: Indices, high: Indices) -> npt.NDArray[np.bool_]:
    if not flags.any():
        return np.zeros(len(low), np.bool_)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(flags)])
    low = np.minimum(low, len(flags))
    return np.asarray(sums[np.maximum(high, low)] > sums[low])


def _leaf(column: Column) -> _Layout:
    n = len(column)
    bad = np.where(_valid(column), 0, _NULL_INSIDE).astype(np.uint8)
    kind = column.type
    flat: Array
    if pa.types.is_boolean(kind):
        packed = np.frombuffer(_data(column), dtype=np.uint8)
        flat = np.unpackbits(packed, bitorder="little", count=column.offset + n)[column.offset :].astype(np.bool_)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        dtype = np.dtype(kind.to_pandas_dtype())
        flat = np.frombuffer(_data(column), dtype=dtype)[column.offset : column.offset + n]
    else:
        flat = np.empty(n, dtype=np.object_)
        for at, raw in enumerate(column.cast(pa.large_binary()).to_pylist()):
            try:
                flat[at] = "" if raw is None else raw.decode("utf-8")
            except UnicodeDecodeError:
                bad[at] |= _NOT_UTF8
    return _Layout(flat, np.arange(n, dtype=np.int64), np.zeros((n, 0), dtype=np.int64), bad)


def _data(column: Column) -> Any:
    buffer = column.buffers()[1]
    return b"" if buffer is None else buffer


def _shaped(column: Column, rank: int | None, name: str, *, unit: bool) -> RowTensors:
    shape, data = _layout(column.field("shape")), _layout(column.field("data"))
    valid = _valid(column) & _valid(column.field("shape")) & _valid(column.field("data"))
    failures = _failures(shape.bad | data.bad, valid, name)
    usable = valid & ((shape.bad | data.bad) == 0)
    given = np.where(usable, shape.shapes[:, 0], 0)
    too_many = given > MOST_AXES
    for row in np.flatnonzero(too_many):
        failures[int(row)] = _wrong_rank(name, int(given[row]), None)
    usable &= ~too_many
    given[too_many] = 0
    starts = shape.starts
    if unit and rank is not None and len(shape.flat):
        leading = (given == rank + 1) & (shape.flat[np.minimum(starts, len(shape.flat) - 1)] == 1)
        given, starts = given - leading, starts + leading
    width = int(given.max(initial=0)) if rank is None else rank
    there = np.arange(width)[None, :] < given[:, None]
    shapes = np.full((len(column), width), NO_AXIS, np.int64)
    shapes[there] = shape.flat[(starts[:, None] + np.arange(width)[None, :])[there]].astype(np.int64)
    counts = data.shapes[:, 0]
    wrong_rank = usable & (given != width) if rank is not None else np.zeros(len(column), np.bool_)
    for row in np.flatnonzero(wrong_rank):
        failures[int(row)] = _wrong_rank(name, int(given[row]), rank)
    # In floating point, so that sizes whose product overflows do not match by accident.
    elements = np.prod(np.where(there, shapes, 1), axis=1, dtype=np.float64)
    for row in np.flatnonzero(usable & ~wrong_rank & ((there & (shapes < 0)).any(axis=1) | (elements != counts))):
        message = f"{name}: shape {shapes[row][there[row]].tolist()} does not match its {int(counts[row])} elements"
        failures[int(row)] = (RowErrorCode.INVALID_VALUE, message)
    shapes[list(failures)] = 0
    made = RowTensors(data.flat, data.starts, shapes, failures)
    _addressable(made, name)
    return made


def _addressable(rows: RowTensors, name: str) -> None:
    """Record ``invalid_value`` for shapes that numpy cannot hold, even without elements, such as [0, 2**62]."""
    room = np.prod(np.maximum(rows.shapes, 1), axis=1, dtype=np.float64) * rows.flat.itemsize
    for row in np.flatnonzero(room >= MOST_BYTES):
        shape = [int(size) for size in rows.shapes[row] if size != NO_AXIS]
        message = f"{name}: no memory holds the shape {shape}"
        rows.failures.setdefault(int(row), (RowErrorCode.INVALID_VALUE, message))
        rows.shapes[row] = 0
