"""Pure: the option ``masks``, and what follows from it for inputs, outputs and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.engines.onnx.runtime import low_precision
from pipeline.engines.onnx.runtime.run import Array
from pipeline.engines.onnx.runtime.signature import GraphValue, RowMode, Signature
from pipeline.engines.onnx.tensor.row_tensors import Failure, RowTensors
from pipeline.spec.error_codes import RowErrorCode
from storage.errors import InvalidJob

MOST_MASK_BYTES = 2**28
"""Of one row's mask that is made here."""

Tensors = Mapping[str, RowTensors]
"""The rows of every graph input, by its name."""


@dataclass(frozen=True, slots=True)
class Masks:
    """``of``: the name that the graph gives an axis → its input, [rows, axis], that is 1 where the axis is real.

    Inputs whose axes go by that name are padded with their last element, the mask with zeros; outputs are cut to the
    row's own size. A mask of which the rows hold no column is made here: all of a row is real.
    """

    signature: Signature
    of: Mapping[str, str]

    def check(self, mode: RowMode) -> None:
        """Raises :class:`~storage.errors.InvalidJob` for an axis or an input that the graph does not have, and for a
        graph whose rows are not stacked."""
        inputs = {value.name: value for value in self.signature.inputs}
        if self.of and mode != "stack":
            raise _refused(f"only rows that are stacked are padded, and this graph's are not: {self.signature}")
        for mask in set(self.of.values()):
            if len(having := [axis for axis in self.of if self.of[axis] == mask]) > 1:
                raise _refused(f"{mask!r} is named for {' and '.join(having)}; each axis needs a mask of its own")
        for axis, mask in self.of.items():
            if mask not in inputs:
                raise _refused(f"the graph has no input {mask!r}; it has {', '.join(inputs)}")
            if not any(axis in (value.dims or ())[1:] for name, value in inputs.items() if name != mask):
                known = sorted({dim for v in inputs.values() for dim in (v.dims or ())[1:] if isinstance(dim, str)})
                raise _refused(
                    f"no input but the mask has an axis {axis!r} behind its first; the names are "
                    f"{', '.join(known) or 'none'}"
                )
            value = inputs[mask]
            numbers = value.dtype.kind in "biuf" or low_precision.is_float(value.dtype)
            if value.dims is None or value.dims[1:] != (axis,) or not numbers:
                raise _refused(f"the mask of {axis!r} is [rows, {axis}] in numbers or booleans; the graph has {value}")

    def axes(self, value: GraphValue) -> dict[int, str]:
        """Axes of one row of this input or output that may be padded, by name."""
        return {at: str(dim) for at, dim in enumerate((value.dims or ())[1:]) if dim in self.of}

    def made(self, axis: str, tensors: Tensors) -> RowTensors:
        """The mask of rows that bring none. ``tensors``: the other inputs."""
        mask = self.of[axis]
        dtype = next(value.dtype for value in self.signature.inputs if value.name == mask)
        sizes = np.zeros(len(next(iter(tensors.values())).starts), np.int64)
        for value in self.signature.inputs:
            for at, name in self.axes(value).items():
                # A column of the wrong type has no sizes, and no row that is run.
                if name == axis and value.name in tensors and tensors[value.name].shapes.shape[1] > at:
                    sizes = tensors[value.name].shapes[:, at].copy()
        failures: dict[int, Failure] = {}
        for row in np.flatnonzero(sizes * dtype.itemsize > MOST_MASK_BYTES):
            message = (
                f"the row has {sizes[row]} elements along {axis!r}: too many for a mask that is made; bring a column"
            )
            failures[int(row)] = (RowErrorCode.INVALID_VALUE, message)
            sizes[row] = 0
        # Ones without end, in the memory of one.
        ones = np.broadcast_to(np.ones(1, dtype), (int(sizes.max(initial=0)),))
        return RowTensors(ones, np.zeros(len(sizes), np.int64), sizes[:, None], failures)

    def inside(self, value: GraphValue, ndim: int, sizes: Mapping[str, int]) -> tuple[slice, ...]:
        """The real part of stacked rows of one size, [n, ...] with ``ndim`` axes. ``sizes``: of a row, by axis."""
        axes = self.axes(value)
        rest = [slice(0, sizes[axes[at]]) if at in axes else slice(None) for at in range(ndim - 1)]
        return (slice(None), *rest)

    def cut(self, outputs: Sequence[Array], sizes: Mapping[str, int]) -> list[Array]:
        """Outputs of stacked rows of one size, without what their padding gave."""
        return [
            output[self.inside(value, output.ndim, sizes)]
            for value, output in zip(self.signature.outputs, outputs, strict=True)
        ]

    def sizes(self, tensors: Tensors, item: int) -> dict[str, int]:
        """A row's size along every axis with a mask."""
        return {
            name: int(tensors[value.name].shapes[item, at])
            for value in self.signature.inputs
            for at, name in self.axes(value).items()
        }


def _refused(why: str) -> InvalidJob:
    return InvalidJob(why, field="engine_options.masks")
