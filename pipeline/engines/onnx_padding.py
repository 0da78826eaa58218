"""Whether rows of different size may be padded to run together: tried on rows that tell, not believed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np

from pipeline.engines import onnx_narrow
from pipeline.engines.onnx_lane import Array, RunFailed
from pipeline.engines.onnx_masks import Masks, Tensors
from pipeline.engines.onnx_stacking import has_numbers, same
from pipeline.engines.tensors.rows import Indices

TRIALS = 16
"""So many batches that do not tell, and rows are not padded."""
_LOOKED_AT = 4
"""Most rows of a batch that are looked at for one to try."""

Feed = dict[str, Array]


class Padding:
    """``proved``: ``None`` until a trial has told.

    A trial halves a row along its axes with a mask. The half alone has to give what the whole row gives with the rest
    masked: so what is masked are real elements, and as many as are real, which no graph that forgets its mask passes
    by luck. And the mask has to matter: where the rest, not masked, changes nothing, the row does not tell.
    """

    def __init__(self, masks: Masks, notify: Callable[[str], None]) -> None:
        self.masks = masks
        self.proved: bool | None = None if masks.of else False
        self._notify = notify
        self._lock = threading.Lock()
        self._trials = 0
        self._made: set[str] = set()

    def tell_made(self, made: Mapping[str, str]) -> None:
        """Say, once, which masks the rows have no column for."""
        with self._lock:
            new = sorted(made.keys() - self._made)
            self._made |= made.keys()
        if new:
            self._notify(f"no column {', '.join(map(repr, new))}: all of each row is real")

    def may(self, compute: Callable[[Feed], list[Array]], tensors: Tensors, items: Indices) -> bool:
        """Whether rows may be padded. Tries it on the rows of this batch while that is not known."""
        if self.proved is not None:
            return self.proved
        trial = self._trial(tensors, items)
        if trial is None:
            return self._untold()
        sizes, half, hidden, shown = trial
        try:
            alone = compute(half)
            masked, whole = (self.masks.cut(compute(feed), sizes) for feed in (hidden, shown))
        except RunFailed:  # a half may be too short for the graph
            return self._untold()
        if not all(map(same, masked, alone)):
            self.give_up(0)
            return False
        if all(map(same, whole, alone)) or not all(map(has_numbers, alone)):
            return self._untold()
        with self._lock:
            self.proved = True if self.proved is None else self.proved
            return self.proved

    def give_up(self, known: int) -> None:
        """Padding changes results. ``known``: rows that were padded before."""
        with self._lock:
            told, self.proved = self.proved is False, False
        if not told:
            self._notify(
                "rows change when they are padded (is a mask 1 where the axis is real?); rows of one shape run "
                "together"
                + (f". {known} rows were padded before that showed: run them again without masks" if known else "")
            )

    def _untold(self) -> bool:
        with self._lock:
            self._trials += 1
            over = self._trials >= TRIALS and self.proved is None
            if over:
                self.proved = False
        if over:
            self._notify("the masks changed nothing, or could not be tried: rows of one shape run together")
        return False

    def _trial(self, tensors: Tensors, items: Indices) -> tuple[dict[str, int], Feed, Feed, Feed] | None:
        """Half of a row, by its sizes; the row with the rest masked; and the row. ``None``: no row to try it on."""
        masks = set(self.masks.of.values())
        others = [value.name for value in self.masks.signature.inputs if value.name not in masks]
        for item in items[:_LOOKED_AT]:
            sizes = {axis: size // 2 for axis, size in self.masks.sizes(tensors, int(item)).items()}
            if not all(sizes.values()):
                continue
            shown = {name: rows.gather(np.array([item])) for name, rows in tensors.items()}
            half, hidden = dict(shown), dict(shown)
            for value in self.masks.signature.inputs:
                axes, whole = self.masks.axes(value), shown[value.name]
                parts = [slice(0, sizes[axes[at]]) if at in axes else slice(None) for at in range(whole.ndim - 1)]
                inside = (slice(None), *parts)
                half[value.name] = np.ascontiguousarray(whole[inside])
                if value.name in masks:
                    hidden[value.name] = np.zeros_like(whole)
                    hidden[value.name][inside] = half[value.name]
            seen = all(half[mask].astype(bool).any() for mask in masks)
            if seen and any(_differs(half[name], shown[name]) for name in others):
                return sizes, half, hidden, shown
        return None


def _differs(half: Array, whole: Array) -> bool:
    """Whether the other half is another one, by its mean: a graph that takes means must not be fooled."""
    if half.size == whole.size:
        return False
    if half.dtype == np.object_:
        return set(half.reshape(-1)) != set(whole.reshape(-1))
    carrier = onnx_narrow.carrier(half.dtype)
    a, b = (array.astype(carrier, copy=False).astype(np.float64) for array in (half, whole))
    if not np.isfinite(b).all():
        return False
    return bool(abs(a.mean() - b.mean()) > 1e-2 * abs(b.mean()) + 1e-3 * b.std())
