"""Whether a row gets the same result in a batch as alone: which rows to try, how to compare, when to try again."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import numpy as np

from pipeline.engines.onnx.runtime import low_precision
from pipeline.engines.onnx.runtime.run import Array

CHECKED = 16
"""After the proof, one batch in this many has one of its rows run alone, too; so have the first few."""
_FIRST = 8
_MOST_SHAPES = 4096


class SpotCheck:
    """Says which row of a batch is compared although stacking has been proved. Seeded: a job does the same twice."""

    def __init__(self) -> None:
        self._random = random.Random(0)  # noqa: S311 - which rows are looked at is no secret
        self._shapes: set[int] = set()
        self._batches = 0

    def row(self, shapes: Sequence[Hashable], n_rows: int) -> list[int]:
        """The position of the row to run alone, or none. Every shape is looked at once, as far as they are kept."""
        self._batches += 1
        key = hash(tuple(shapes))
        new = key not in self._shapes and len(self._shapes) < _MOST_SHAPES
        if new:
            self._shapes.add(key)
        if not new and self._batches > _FIRST and self._random.randrange(CHECKED):
            return []
        return [self._random.randrange(n_rows)]


def pick_probe_rows(inputs: Sequence[Array]) -> list[int]:
    """Positions of two rows that differ, of those without NaN and infinity where there are any; else of one row.

    ``inputs``: the graph's inputs, stacked, [n, ...] each.
    """
    n = len(inputs[0])
    clean = np.ones(n, np.bool_)
    for array in inputs:
        clean &= low_precision.finite(array).reshape(n, -1).all(axis=1)
    of = np.flatnonzero(clean) if clean.sum() > 1 else np.arange(n)
    differs = np.zeros(len(of), np.bool_)
    for array in inputs:
        differs |= (array[of] != array[of[:1]]).reshape(len(of), -1).any(axis=1)
    differs[:1] = False  # a NaN differs from itself
    others = of[differs]
    return [int(of[0]), int(others[-1])] if len(others) else [int(of[0])]


def conclusive(output: Array) -> bool:
    """False for floats without a finite one: they would equal those of another row, whatever was computed."""
    return not output.size or bool(low_precision.finite(output).any())


def allclose(stacked: Array, alone: Array) -> bool:
    """Whether two results are equal, except for the order in which kernels sum."""
    if stacked.shape != alone.shape:
        return False
    if not low_precision.is_float(stacked.dtype):
        return bool(np.array_equal(stacked, alone))
    # Kernels sum in another order for another batch size: a thousandth of the row's own scale is no rounding error.
    a, b = stacked.astype(np.float64), alone.astype(np.float64)
    finite = np.isfinite(b)
    scale = float(np.abs(b[finite]).max(initial=0.0))
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True))
