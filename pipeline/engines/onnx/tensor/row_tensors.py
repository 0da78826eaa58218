"""The tensors of a column's rows: checked against what the graph wants, and stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engines.onnx.runtime import low_precision
from pipeline.engines.onnx.runtime.signature import Dim
from pipeline.spec.error_codes import RowErrorCode

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Failure = tuple[str, str]

UNKNOWN = -1
"""The inner size of a list without elements: it fits whatever the graph wants."""
NO_AXIS = -2
"""Fills the sizes of rows of a lower rank than others of their column."""


@dataclass(slots=True)
class RowTensors:
    """n rows of one column. Row i is the ``prod(shapes[i])`` elements of ``flat`` from ``starts[i]`` on, in C order.

    ``shapes``: int64 [n, rank], with -1 for an inner size that an empty list leaves open, and -2 behind the last axis
    of a row of lower rank. ``failures``: row position → code, message; such a row has no shape. ``permutation``:
    of the axes, for stored orders other than C.
    """

    flat: Array
    starts: Indices
    shapes: Indices
    failures: dict[int, Failure] = field(default_factory=dict)
    permutation: tuple[int, ...] | None = None

    def fit(self, dims: Sequence[Dim], name: str) -> None:
        """Record ``wrong_shape`` for rows that do not fit the fixed sizes in ``dims``, and fill open sizes from it."""
        for axis, dim in enumerate(dims):
            size = self.shapes[:, axis]
            if isinstance(dim, int):
                size[size == UNKNOWN] = dim
                for row in np.flatnonzero(size != dim):
                    found = [int(s) for s in self.shapes[row]]
                    message = f"{name}: axis {axis} of the row is {found[axis]}, the graph wants {dim} (row {found})"
                    self.failures.setdefault(int(row), (RowErrorCode.WRONG_SHAPE, message))

    def refuse(self, bad: npt.NDArray[np.bool_], code: str, message: Callable[[int], str]) -> None:
        """Record ``code`` for the rows that have a bad element. ``bad``: bool, one for each element of ``flat``;
        ``message`` is given the position in ``flat`` of the row's first one."""
        positions = np.flatnonzero(bad)
        if not len(positions):
            return
        sizes = np.prod(np.where(self.shapes == NO_AXIS, 1, np.maximum(self.shapes, 0)), axis=1, dtype=np.int64)
        first = np.searchsorted(positions, self.starts)
        inside = positions[np.minimum(first, len(positions) - 1)] < self.starts + sizes
        for row in np.flatnonzero((first < len(positions)) & inside):
            self.failures.setdefault(int(row), (code, message(int(positions[first[row]]))))

    def to_low_precision(self, dtype: np.dtype[Any], name: str) -> None:
        """Convert the elements to ``dtype``, a low-precision type. A row with a value that it does not hold gets
        ``invalid_value``."""
        wide = self.flat
        with np.errstate(all="ignore"):
            converted = wide.astype(low_precision.carrier(dtype)).astype(dtype)
            back = converted.astype(wide.dtype)
        same = (back == wide) | ((back != back) & (wide != wide))
        self.refuse(
            ~same,
            RowErrorCode.INVALID_VALUE,
            lambda at: f"{name}: {wide[at]} is no {dtype.name}; round the column before",
        )
        self.flat = converted

    def finite(self, name: str) -> None:
        """Record ``not_finite`` for rows with a NaN or an infinity."""
        flat = self.flat
        self.refuse(
            ~low_precision.finite(flat),
            RowErrorCode.NOT_FINITE,
            lambda at: f"{name} holds {flat[at]}, which the job refuses",
        )

    def below(self, limit: int, name: str) -> None:
        """Record ``invalid_value`` for rows with an index outside ``-limit … limit - 1``."""
        flat = self.flat
        self.refuse(
            (flat < -limit) | (flat >= limit),
            RowErrorCode.INVALID_VALUE,
            lambda at: f"{name}: index {flat[at]} lies outside the graph's table of {limit} rows",
        )

    def gather(self, rows: Indices) -> Array:
        """The rows stacked, [k, *shape]. They must have one shape, and none may be in ``failures``."""
        shape = tuple(int(size) for size in self.shapes[rows[0]] if size != NO_AXIS)
        size = int(np.prod(shape, dtype=np.int64))
        starts = self.starts[rows]
        first = int(starts[0])
        if size == 0 or np.array_equal(starts, first + np.arange(len(rows)) * size):
            stacked = self.flat[first : first + size * len(rows)] if size else self.flat[:0]
        else:
            stacked = self.flat[(starts[:, None] + np.arange(size)[None, :]).reshape(-1)]
        if self.permutation is None:
            return stacked.reshape(len(rows), *shape)
        stored = [0] * len(shape)
        for logical, axis in enumerate(self.permutation):
            stored[axis] = shape[logical]
        turned = stacked.reshape(len(rows), *stored).transpose(0, *(axis + 1 for axis in self.permutation))
        return np.ascontiguousarray(turned)
