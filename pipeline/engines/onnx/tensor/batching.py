"""Pure: which rows of tensors run together, and how they are stacked: rows of one shape, masked axes aside."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from pipeline.engines.onnx.runtime.run import Array
from pipeline.engines.onnx.tensor.masks import Masks, Tensors
from pipeline.engines.onnx.tensor.row_tensors import Indices, RowTensors

MOST_PADDING = 0.25
"""Of each padded input's elements: rows of similar size run together, for padding is computed like the rest."""
STEP = 1.12
"""Of two axes, rows are sorted by the second within steps of the first: two of such steps are a quarter."""
_FIRST_TRIED = 16
"""Rows for a batch, then four times as many while all of them fit: not the whole group for each batch."""
_ANY = -3
"""In a shape: a size that rows of one batch need not share. (-1 and -2 have meanings in ``RowTensors``.)"""


class Batching:
    """``masks`` names the axes along which rows may differ."""

    def __init__(self, masks: Masks) -> None:
        self._masks, self._inputs = masks, masks.signature.inputs

    def groups(self, tensors: Tensors, good: Indices, brought: Collection[str] = ()) -> list[Indices]:
        """Rows that may share a batch, the largest first: of one shape, except for axes with a mask.

        A row without elements and a row whose own mask hides everything are never padded.
        ``brought``: the masks that the rows bring.
        """
        keys: list[Indices] = []
        sizes: dict[str, Indices] = {}
        apart = np.zeros(len(good), np.bool_)
        for value in self._inputs:
            shapes = tensors[value.name].shapes[good]
            axes = self._masks.axes(value)
            if axes:
                apart |= (shapes <= 0).any(axis=1)
            if value.name in brought:
                apart |= ~_any(tensors[value.name], good)
            sizes |= {name: shapes[:, at] for at, name in axes.items()}
            keys.append(shapes.copy())
            keys[-1][:, list(axes)] = _ANY
        columns = list(sizes.values())
        key = np.concatenate([*keys, *(np.where(apart, size, _ANY)[:, None] for size in columns)], axis=1)
        if not len(good) or (not columns and (key == key[0]).all()):
            return [good] if len(good) else []
        _, group = np.unique(key, axis=0, return_inverse=True)
        # Of several axes all but the last in steps, so that the last one is in order within them.
        coarse = [-np.floor(np.log(np.maximum(size, 1)) / np.log(STEP)) for size in columns[:-1]]
        order = np.lexsort([*(-size for size in columns[-1:]), *reversed(coarse), group.reshape(-1)])
        ends = np.flatnonzero(np.diff(group.reshape(-1)[order])) + 1
        return np.split(good[order], ends)

    def parts(
        self, tensors: Tensors, good: Indices, most_rows: int, most_bytes: int, brought: Collection[str] = ()
    ) -> list[Indices]:
        """The rows in batches of at most ``rows`` rows and ``n_bytes`` bytes of input; one row may be larger."""
        found = []
        for group in self.groups(tensors, good, brought):
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
        for value in self._inputs:
            rows = tensors[value.name]
            shapes = np.maximum(rows.shapes[items], 1 if value.dims is None else 0)  # an open rank has no size there
            padded = taken * np.prod(np.maximum.accumulate(shapes, axis=0), axis=1, dtype=np.int64)
            total += rows.flat.itemsize * padded
            if self._masks.axes(value):
                fits &= padded - np.cumsum(np.prod(shapes, axis=1, dtype=np.int64)) <= MOST_PADDING * padded
        fits &= total <= most_bytes
        fits[0] = True
        return len(items) if fits.all() else int(np.argmin(fits))

    def unequal(self, tensors: Tensors, items: Indices) -> bool:
        """Whether the rows, of one batch, differ in size."""
        return bool(self._masks.of) and any((r.shapes[items] != r.shapes[items[:1]]).any() for r in tensors.values())

    def most_padded(self, tensors: Tensors, items: Indices) -> int:
        """The position of the row that is padded most in this batch."""
        share = np.ones(len(items))
        for value in self._inputs:
            if self._masks.axes(value):
                shapes = tensors[value.name].shapes[items]
                share = np.minimum(share, np.prod(shapes / np.maximum(shapes.max(axis=0), 1), axis=1))
        return int(np.argmin(share))

    def shape_key(self, tensors: Tensors, items: Indices) -> list[tuple[object, ...]]:
        """The shape of a batch's rows. For rows that differ in size, each size stands as a power of two."""
        padded = self.unequal(tensors, items)
        found: list[tuple[object, ...]] = [("padded", padded)]
        for value in self._inputs:
            shapes = tensors[value.name].shapes[items]
            shape = shapes[0].tolist()
            for at in self._masks.axes(value) if padded else ():
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
        return {v.name: self._gather(v.name, tensors[v.name], items) for v in self._inputs}

    def _gather(self, name: str, rows: RowTensors, items: Indices) -> Array:
        shapes = rows.shapes[items]
        if (shapes == shapes[:1]).all():
            return rows.gather(items)
        stacked: Array = np.zeros((len(items), *shapes.max(axis=0).tolist()), rows.flat.dtype)
        for run in self.alike({name: rows}, items):
            sizes = shapes[run.start].tolist()
            stacked[(run, *(slice(0, size) for size in sizes))] = rows.gather(items[run])
            for at, size in enumerate(sizes if name not in self._masks.of.values() else ()):
                before = [slice(None)] * at  # what these axes lack has been filled
                stacked[(run, *before, slice(size, None))] = stacked[(run, *before, slice(size - 1, size))]
        return stacked


def _any(rows: RowTensors, items: Indices) -> npt.NDArray[np.bool_]:
    """Which rows, of one axis, have an element that is not zero."""
    before = np.concatenate([[0], np.cumsum(rows.flat != 0)])
    ends = np.minimum(rows.starts[items] + np.maximum(rows.shapes[items, 0], 0), len(rows.flat))
    return np.asarray(before[ends] > before[rows.starts[items]])
