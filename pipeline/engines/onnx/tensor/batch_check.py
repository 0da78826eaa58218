"""Whether rows that run together get what they get alone: stacked, and padded where they differ in size."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from pipeline.engines.onnx.runtime.run import Array
from pipeline.engines.onnx.runtime.signature import RowMode
from pipeline.engines.onnx.tensor.batching import Batching
from pipeline.engines.onnx.tensor.masks import Masks, Tensors
from pipeline.engines.onnx.tensor.padding_check import Compute, Feed, Padding
from pipeline.engines.onnx.tensor.row_tensors import Indices
from pipeline.engines.onnx.tensor.stacking_check import SpotCheck, allclose, conclusive, pick_probe_rows
from storage.errors import InvalidJob

Alone = Callable[[Indices], list[Array]]
"""The position of one row → its outputs, each [1, ...]."""


class BatchInvarianceCheck:
    """``stacks``, ``padding.proved``: whether rows may be stacked, and padded; ``None`` until a batch has proved it.

    ``fixed``: the only size of the graph's batches, where it has one. ``counts``: where stacked, padded and compared
    rows are counted.
    """

    def __init__(
        self, mode: RowMode, masks: Masks, fixed: int | None, notify: Callable[[str], None], counts: Counter[str]
    ) -> None:
        self._masks, self._fixed, self._notify, self._counts = masks, fixed, notify, counts
        self._batching = Batching(masks)
        self._lock = threading.Lock()
        self._spot_check = SpotCheck()
        self.stacks: bool | None = None if mode == "stack" else False
        self.padding = Padding(masks, notify, lambda: self._counts["padded_rows"])

    def outputs(self, together: Compute, alone: Alone, tensors: Tensors, items: Indices) -> list[Array] | None:
        """The outputs of rows that run together; ``None`` when each row has to run alone."""
        padded = self._batching.unequal(tensors, items)
        # Also where nothing is to be padded: a mask that is made must not hide what is real.
        may_pad = self.padding.allowed(together, tensors, items)
        if len(items) < 2 or self.stacks is False or (padded and not may_pad):
            return None
        feed = self._batching.gather(tensors, items)
        outputs = together(feed)
        return outputs if self._legitimate(together, alone, tensors, items, feed, outputs, padded) else None

    def _legitimate(
        self,
        together: Compute,
        alone: Alone,
        tensors: Tensors,
        items: Indices,
        feed: Feed,
        outputs: list[Array],
        padded: bool,
    ) -> bool:
        """Whether the batch gives each of its rows what it gets alone.

        Checked by size on every batch, and by value: two rows that differ are run alone until they prove it, then a
        row at random (the one that is padded most) for every new shape and now and then (see
        :class:`~.stacking_check.SpotCheck`). A graph that normalizes over its first axis passes the check by size and
        fails the one by value. While nothing is proved (equal rows, results without numbers) the rows are run alone.
        """
        fits = all(output.ndim and len(output) == len(items) for output in outputs)
        with self._lock:
            proved = self.stacks is True
            probes = self._spot_check.row(self._batching.shape_key(tensors, items), len(items)) if proved else []
        if padded and probes:
            probes = [self._batching.most_padded(tensors, items)]
        if fits and not proved:
            masks = set(self._masks.of.values())  # different sizes do not show that the values differ
            probes = pick_probe_rows([array for name, array in feed.items() if name not in masks])
        tells = len(probes) > 1
        for at in probes if fits else ():
            found, expected = [output[at : at + 1] for output in outputs], alone(items[at : at + 1])
            with self._lock:
                self._counts["compared_rows"] += 1
            sizes = self._masks.sizes(tensors, int(items[at]))
            if padded:
                found = self._masks.cut(found, sizes)
            tells = tells and all(map(conclusive, expected))
            if all(allclose(a, b) for a, b in zip(found, expected, strict=True)):
                continue
            fits = False
            if padded:
                # Padded as before, but without the other rows: is it they, or is it the padding?
                single = self._masks.cut(together({name: array[at : at + 1] for name, array in feed.items()}), sizes)
                if not all(map(allclose, single, expected)):
                    self.padding.give_up()
                    return False
        return self._conclude(fits, tells, len(items), padded)

    def _conclude(self, fits: bool, tells: bool, n_rows: int, padded: bool) -> bool:
        """Whether the batch is good, by what its comparison gave; remembered for the next."""
        if not fits and self._fixed is not None:
            raise InvalidJob(
                f"rows change each other's result in the graph's batches of {self._fixed}; set it to 'whole', and let "
                "each row hold a whole input",
                field="engine_options.row_mode",
            )
        with self._lock:
            told, known = self.stacks is False, self._counts["stacked_rows"]
            if not fits:
                self.stacks = False
            elif tells and self.stacks is None:
                self.stacks = True
            good = fits and self.stacks is True and not (padded and self.padding.proved is False)
            self._counts["stacked_rows"] += n_rows if good else 0
            self._counts["padded_rows"] += n_rows if good and padded else 0
        if not fits and not told:
            self._notify(
                "rows change each other's result when they are stacked in this graph; each is run alone"
                + (f". {known} rows were stacked before that showed: run them again with max_batch 1" if known else "")
            )
        return good
