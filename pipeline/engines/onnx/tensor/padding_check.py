"""Whether rows of different size may be padded to run together: tried on rows whose padding would show."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.engines.onnx.runtime import low_precision
from pipeline.engines.onnx.runtime.run import Array, RunFailed, RunTimedOut, is_out_of_memory
from pipeline.engines.onnx.tensor.masks import Masks, Tensors
from pipeline.engines.onnx.tensor.row_tensors import Indices
from pipeline.engines.onnx.tensor.stacking_check import allclose, conclusive
from storage.errors import InvalidJob

TRIALS = 16
"""After this many trials without a verdict, padding is off."""
_LOOKED_AT = 4
"""Most rows of a batch that are looked at for one to try."""
_SAMPLED = 65_536
"""Most elements of a row whose spread is computed."""

Feed = dict[str, Array]
Compute = Callable[[Feed], list[Array]]
"""Stacked inputs → stacked outputs of the graph."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """One row, stacked as [1, ...]: its first ``half`` along every axis with a mask, ``sizes`` long; the row with the
    rest ``masked``; and the row with nothing masked, ``shown``."""

    sizes: Mapping[str, int]
    half: Feed
    masked: Feed
    shown: Feed


class Padding:
    """``proved``: ``None`` until trials have told.

    A trial halves a row along its axes with a mask. The half alone has to give the same result as the whole row with
    its second half masked. And the mask has to matter for every output that has none of these axes: a row proves
    nothing where its second half, unmasked, changes nothing.
    """

    def __init__(self, masks: Masks, notify: Callable[[str], None], padded_rows: Callable[[], int]) -> None:
        self._masks, self._notify, self._padded_rows = masks, notify, padded_rows
        self.proved: bool | None = None if masks.of else False
        self._lock = threading.Lock()
        self._trials = 0
        self._made: set[str] = set()
        self._heeding: set[str] = set()
        """Outputs that a mask was seen to change."""

    def announce(self, made: Mapping[str, str]) -> None:
        """Say, once, which masks the rows have no column for. ``made``: mask → axis."""
        with self._lock:
            new = sorted(made.keys() - self._made)
            self._made |= made.keys()
        if new:
            self._notify(f"no column {', '.join(map(repr, new))}: a mask is made, and all of each row taken for real")

    def allowed(self, compute: Compute, tensors: Tensors, items: Indices) -> bool:
        """Whether rows may be padded. Tries it on a row of this batch while that is not known.

        Raises :class:`InvalidJob` where a mask that was made hides what is real.
        """
        if self.proved is not None:
            return self.proved
        trial = self._trial(tensors, items)
        if trial is None:
            return False
        try:
            return self._conclude(compute, trial)
        except RunFailed as error:  # a half may be too short for the graph
            slow = isinstance(error, RunTimedOut) or is_out_of_memory(error)
            return False if slow else self._without_verdict()

    def _conclude(self, compute: Compute, trial: _Trial) -> bool:
        runs = [compute(feed) for feed in (trial.half, trial.masked, trial.shown)]
        if not all(output.ndim and len(output) == 1 for outputs in runs for output in outputs):
            return self._without_verdict()  # its first axis does not count rows, which is found out elsewhere
        half = runs[0]
        masked, shown = (self._masks.cut(outputs, trial.sizes) for outputs in runs[1:])
        if not all(map(conclusive, half)):
            return self._without_verdict()
        if not all(map(allclose, masked, half)):
            self._check_meaning(compute, trial)
            self.give_up()
            return False
        with self._lock:
            outputs = self._masks.signature.outputs
            heeding = [v.name for v, a, b in zip(outputs, shown, half, strict=True) if not allclose(a, b)]
            self._heeding |= set(heeding)
            told = {value.name for value in outputs if not self._masks.axes(value)} <= self._heeding
            if heeding and told and self.proved is None:
                self.proved = True
            if self.proved is not None:
                return self.proved
        return self._without_verdict()

    def _check_meaning(self, compute: Compute, trial: _Trial) -> None:
        """Of masks that are made, whether they are one where the axis is hidden, as PyTorch's key_padding_mask is."""
        if not self._made or self._made != set(self._masks.of.values()):
            return
        turned = [
            {name: (array == 0).astype(array.dtype) if name in self._made else array for name, array in feed.items()}
            for feed in (trial.half, trial.masked)
        ]
        half, masked = (compute(feed) for feed in turned)
        masked = self._masks.cut(masked, trial.sizes)
        if all(map(allclose, masked, half)) and all(map(conclusive, half)):
            raise InvalidJob(
                f"{', '.join(sorted(self._made))} is 1 where the graph is to look away, and a mask is 1 where the axis "
                "is real; bring it as a column, and name no masks",
                field="engine_options.masks",
            )

    def give_up(self) -> None:
        """Padding changes results."""
        known = self._padded_rows()
        with self._lock:
            told, self.proved = self.proved is False, False
        if not told:
            self._notify(
                "rows change when they are padded (is a mask 1 where the axis is real?); rows of one shape run together"
                + (f". {known} rows were padded before that showed: run them again without masks" if known else "")
            )

    def _without_verdict(self) -> bool:
        with self._lock:
            self._trials += 1
            over = self._trials >= TRIALS and self.proved is None
            if over:
                self.proved = False
        if over:
            self._notify("the masks changed nothing, or could not be tried: rows of one shape run together")
        return False

    def _trial(self, tensors: Tensors, items: Indices) -> _Trial | None:
        """``None``: no row to try it on."""
        inputs = self._masks.signature.inputs
        masks = set(self._masks.of.values())
        padded = [value.name for value in inputs if self._masks.axes(value) and value.name not in masks]
        for item in items[:_LOOKED_AT]:
            sizes = {axis: size // 2 for axis, size in self._masks.sizes(tensors, int(item)).items()}
            if not all(sizes.values()):
                continue
            shown = {name: rows.gather(np.array([item])) for name, rows in tensors.items()}
            if not all(low_precision.finite(array).all() for array in shown.values()):
                continue
            half, masked = dict(shown), dict(shown)
            for value in inputs:
                inside = self._masks.inside(value, shown[value.name].ndim, sizes)
                half[value.name] = np.ascontiguousarray(shown[value.name][inside])
                if value.name in masks:
                    masked[value.name] = np.zeros_like(shown[value.name])
                    masked[value.name][inside] = half[value.name]
            seen = all(half[mask].astype(bool).any() for mask in masks)
            if seen and all(_differ(half[name], shown[name]) for name in padded):
                return _Trial(sizes, half, masked, shown)
        return None


def _differ(half: Array, shown: Array) -> bool:
    """Whether the rest of a row is unlike its first half, by their means: a graph that takes means must not be
    fooled."""
    if not half.size:
        return False
    if half.dtype == np.object_:
        return set(half.reshape(-1)) != set(shown.reshape(-1))
    some: Sequence[Array] = [array.astype(low_precision.carrier(array.dtype), copy=False) for array in (half, shown)]
    one, other = (float(array.mean(dtype=np.float64)) for array in some)
    flat = some[1].reshape(-1)
    spread = float(flat[:: max(1, len(flat) // _SAMPLED)].astype(np.float64).std())
    return abs(one - other) > 1e-2 * abs(other) + 1e-3 * spread
