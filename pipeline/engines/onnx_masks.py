"""Pure: axes along which rows of different size run together, padded; a mask tells what is real."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.engines import onnx_narrow
from pipeline.engines.onnx_graph import GraphValue, RowMode, Signature
from pipeline.engines.onnx_lane import Array
from pipeline.engines.tensors.rows import Failure, Indices, RowTensors
from pipeline.row_errors import RowErrorCode
from storage.errors import InvalidJob

MOST_PADDING = 0.25
"""Of each padded input's elements: rows of similar size run together, for padding is computed like the rest."""
MOST_MASK_BYTES = 2**31
"""Of one row's mask that is made here."""
STEP = 1.12
"""Of two axes, rows are sorted by the second within steps of the first: two of such steps are a quarter."""
_FIRST_TRIED = 16
"""Rows for a batch, then four times as many while all of them fit: not the whole group for each batch."""
_ANY = -1
"""In a shape: a size that rows of one batch need not share."""

Tensors = Mapping[str, RowTensors]


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
        if len(set(self.of.values())) < len(self.of):
            raise _refused("an input is the mask of one axis")
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
            numbers = value.dtype.kind in "biuf" or onnx_narrow.is_float(value.dtype)
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
            message = f"the row has {sizes[row]} elements along {axis!r}, and no mask of such a size is made"
            failures[int(row)] = (RowErrorCode.INVALID_VALUE, message)
            sizes[row] = 0
        # Ones without end, in the memory of one.
        ones = np.broadcast_to(np.ones(1, dtype), (int(sizes.max(initial=0)),))
        return RowTensors(ones, np.zeros(len(sizes), np.int64), sizes[:, None], failures)

    def groups(self, tensors: Tensors, good: Indices, own: Collection[str] = ()) -> list[Indices]:
        """Rows that may share a batch, the largest first: alike but for the axes with a mask.

        Not padded, so that they are what they are alone: a row without elements, and one whose own mask hides all.
        ``own``: the masks that the rows bring.
        """
        keys: list[Indices] = []
        sizes: dict[str, Indices] = {}
        bare = np.zeros(len(good), np.bool_)
        for value in self.signature.inputs:
            shapes = tensors[value.name].shapes[good]
            axes = self.axes(value)
            if axes:
                bare |= (shapes <= 0).any(axis=1)
            if value.name in own:
                bare |= ~_any(tensors[value.name], good)
            sizes |= {name: shapes[:, at] for at, name in axes.items()}
            keys.append(shapes.copy())
            keys[-1][:, list(axes)] = _ANY
        columns = list(sizes.values())
        key = np.concatenate([*keys, *(np.where(bare, size, _ANY)[:, None] for size in columns)], axis=1)
        if not key.shape[1]:
            return [good] if len(good) else []
        _, group = np.unique(key, axis=0, return_inverse=True)
        # Of several axes all but the last in steps, so that the last one is in order within them.
        coarse = [-np.floor(np.log(np.maximum(size, 1)) / np.log(STEP)) for size in columns[:-1]]
        order = np.lexsort([*(-size for size in columns[-1:]), *reversed(coarse), group.reshape(-1)])
        ends = np.flatnonzero(np.diff(group.reshape(-1)[order])) + 1
        return np.split(good[order], ends)

    def parts(
        self, tensors: Tensors, good: Indices, most_rows: int, most_bytes: int, own: Collection[str] = ()
    ) -> list[Indices]:
        """The rows in batches of at most so many rows and bytes of input; one row may be larger."""
        found = []
        for group in self.groups(tensors, good, own):
            begin = 0
            while begin < len(group):
                tried, most = _FIRST_TRIED, min(most_rows, len(group) - begin)
                while True:
                    some = group[begin : begin + min(tried, most)]
                    fitting = self._fitting(tensors, some, most_bytes)
                    if fitting < len(some) or len(some) == most:
                        break
                    tried *= 4
                found.append(group[begin : begin + fitting])
                begin += fitting
        return found

    def _fitting(self, tensors: Tensors, items: Indices, most_bytes: int) -> int:
        """How many of the first rows make a batch."""
        taken = np.arange(1, len(items) + 1)
        total = np.zeros(len(items), np.int64)
        fits = np.ones(len(items), np.bool_)
        for value in self.signature.inputs:
            rows = tensors[value.name]
            shapes = np.maximum(rows.shapes[items], 1 if value.dims is None else 0)
            padded = taken * np.prod(np.maximum.accumulate(shapes, axis=0), axis=1, dtype=np.int64)
            total += rows.flat.itemsize * padded
            if self.axes(value):
                fits &= padded - np.cumsum(np.prod(shapes, axis=1, dtype=np.int64)) <= MOST_PADDING * padded
        fits &= total <= most_bytes
        fits[0] = True
        return len(items) if fits.all() else int(np.argmin(fits))

    def unequal(self, tensors: Tensors, items: Indices) -> bool:
        """Whether the rows, of one batch, differ in size."""
        return bool(self.of) and any((r.shapes[items] != r.shapes[items[:1]]).any() for r in tensors.values())

    def most_padded(self, tensors: Tensors, items: Indices) -> int:
        """The position of the row that is padded most in this batch."""
        share = np.ones(len(items))
        for value in self.signature.inputs:
            if self.axes(value):
                shapes = tensors[value.name].shapes[items]
                share = np.minimum(share, np.prod(shapes / np.maximum(shapes.max(axis=0), 1), axis=1))
        return int(np.argmin(share))

    def kind(self, tensors: Tensors, items: Indices) -> list[tuple[object, ...]]:
        """The shape of a batch's rows; of rows that differ in size, without their sizes but for the magnitude."""
        padded = self.unequal(tensors, items)
        found: list[tuple[object, ...]] = [("padded", padded)]
        for value in self.signature.inputs:
            shapes = tensors[value.name].shapes[items]
            shape = shapes[0].tolist()
            for at in self.axes(value) if padded else ():
                shape[at] = int(shapes[:, at].max()).bit_length()
            found.append((value.name, *shape))
        return found

    def alike(self, tensors: Tensors, items: Indices) -> list[slice]:
        """Runs of neighbours of one size."""
        shapes = np.concatenate([rows.shapes[items] for rows in tensors.values()], axis=1)
        ends = np.flatnonzero((shapes[1:] != shapes[:-1]).any(axis=1)) + 1
        return [slice(a, b) for a, b in zip([0, *ends.tolist()], [*ends.tolist(), len(items)], strict=True)]

    def gather(self, tensors: Tensors, items: Indices) -> dict[str, Array]:
        """The rows of every input stacked, [n, *largest size]: behind the smaller ones their last element, and zeros in
        masks."""
        return {v.name: self._gather(v.name, tensors[v.name], items) for v in self.signature.inputs}

    def _gather(self, name: str, rows: RowTensors, items: Indices) -> Array:
        shapes = rows.shapes[items]
        if (shapes == shapes[:1]).all():
            return rows.gather(items)
        stacked: Array = np.zeros((len(items), *shapes.max(axis=0).tolist()), rows.flat.dtype)
        for run in self.alike({name: rows}, items):
            sizes = shapes[run.start].tolist()
            stacked[(run, *(slice(0, size) for size in sizes))] = rows.gather(items[run])
            for at, size in enumerate(sizes if name not in self.of.values() else ()):
                before = [slice(None)] * at  # what these axes lack has been filled
                stacked[(run, *before, slice(size, None))] = stacked[(run, *before, slice(size - 1, size))]
        return stacked

    def cut(self, outputs: Sequence[Array], sizes: Mapping[str, int]) -> list[Array]:
        """The outputs of rows of one size, without what their padding gave. ``sizes``: by axis."""
        found = []
        for value, output in zip(self.signature.outputs, outputs, strict=True):
            axes = self.axes(value)
            inside = [slice(0, sizes[axes[at]]) if at in axes else slice(None) for at in range(output.ndim - 1)]
            found.append(output[(slice(None), *inside)])
        return found

    def sizes(self, tensors: Tensors, item: int) -> dict[str, int]:
        """A row's size along every axis with a mask."""
        return {
            name: int(tensors[value.name].shapes[item, at])
            for value in self.signature.inputs
            for at, name in self.axes(value).items()
        }


def _any(rows: RowTensors, items: Indices) -> npt.NDArray[np.bool_]:
    """Which rows, of one axis, have an element that is not zero."""
    before = np.concatenate([[0], np.cumsum(rows.flat != 0)])
    ends = np.minimum(rows.starts[items] + np.maximum(rows.shapes[items, 0], 0), len(rows.flat))
    return np.asarray(before[ends] > before[rows.starts[items]])


def _refused(why: str) -> InvalidJob:
    return InvalidJob(why, field="engine_options.masks")
