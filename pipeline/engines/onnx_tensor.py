"""The task ``tensor``: rows of tensor columns through any graph, stacked where the graph allows it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engines import onnx_narrow
from pipeline.engines.base import ResultBatch, RowBatch, RowFailure
from pipeline.engines.onnx_graph import Dim, GraphValue, RowMode, Signature, fixed_batch
from pipeline.engines.onnx_masks import Masks
from pipeline.engines.onnx_options import OnnxOptions
from pipeline.engines.onnx_padding import Padding
from pipeline.engines.onnx_session import Array, Run, RunFailed, SessionPool
from pipeline.engines.onnx_stacking import Doubt, has_numbers, same, unlike
from pipeline.engines.onnx_stream import Indices, Pack, Window, bisect, record_batch
from pipeline.engines.tensors.kinds import lossless, tensor_kind
from pipeline.engines.tensors.reading import read
from pipeline.engines.tensors.rows import UNKNOWN, Failure, RowTensors
from pipeline.engines.tensors.writing import column_type, to_arrow
from pipeline.job_spec import JobSpec
from pipeline.row_errors import RowErrorCode
from storage.errors import InvalidInput, InvalidJob

PACK_BYTES = 64 * 2**20
"""Most input bytes stacked into a batch."""


def row_dims(value: GraphValue, mode: RowMode) -> tuple[Dim, ...] | None:
    """The shape of one row of this input or output; ``None`` when the rank is open."""
    return value.dims if mode == "whole" or value.dims is None else value.dims[1:]


def made_here(spec: JobSpec, options: OnnxOptions, schema: pa.Schema) -> dict[str, str]:
    """Masks for which the rows have no column, and none was named → their axes."""
    named = spec.inputs or {}
    return {m: axis for axis, m in options.masks.items() if m not in named and m not in schema.names}


def column_of(spec: JobSpec, name: str) -> str:
    """The input column that feeds the graph input ``name``."""
    return (spec.inputs or {}).get(name, name)


class TensorModel:
    """A loaded graph without any meaning of its own."""

    def __init__(
        self,
        signature: Signature,
        mode: RowMode,
        pool: SessionPool,
        options: OnnxOptions,
        notify: Callable[[str], None],
        limits: Mapping[str, int],
    ) -> None:
        """``limits``: graph input → rows of the table that it indexes (see :func:`.onnx_graph.index_limits`)."""
        self._signature = signature
        self._options = options
        self._limits = limits
        self._pool = pool
        self._notify = notify
        self._lock = threading.Lock()
        self._fixed = fixed_batch(signature) if mode == "stack" else None
        self._max_batch = min(options.max_batch, self._fixed or options.max_batch)
        self._sample: dict[str, Array] | None = None
        self.counts: Counter[str] = Counter()
        self.mode = mode
        self.stacks: bool | None = None if self.mode == "stack" else False
        """Whether rows may be stacked: ``None`` until a batch has proved it."""
        self._masks = Masks(signature, options.masks)
        self._masks.check(mode)
        self.padding = Padding(self._masks, notify)
        self._doubt = Doubt()
        self._types = {v.name: column_type(v.dtype, row_dims(v, self.mode)) for v in signature.outputs}

    def result_schema(self) -> pa.Schema:
        """One column per graph output, under its own name."""
        return pa.schema([pa.field(name, kind) for name, kind in self._types.items()])

    def prepare(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Iterator[Window]:
        """A window per row batch: rows that fit the graph, grouped by their exact shapes but for axes with a mask."""
        for batch in batches:
            yield self._window(spec, batch)

    def _window(self, spec: JobSpec, batch: RowBatch) -> Window:
        n = len(batch.rows)
        failures: dict[int, Failure] = {}
        tensors: dict[str, RowTensors] = {}
        unmasked = made_here(spec, self._options, batch.columns.schema)
        for value in self._signature.inputs:
            if value.name in unmasked:
                continue
            tensors[value.name] = rows = self._read(value, column_of(spec, value.name), batch)
            for at, failure in rows.failures.items():
                failures.setdefault(at, failure)
        self._agree(tensors, failures)
        for mask, axis in unmasked.items():
            tensors[mask] = self._masks.made(axis, tensors)
            failures = tensors[mask].failures | failures
        self.padding.tell_made(unmasked)
        self._count(rows=n)
        good = np.setdiff1d(np.arange(n), np.fromiter(failures, np.int64, len(failures)))
        packs = [self._pack(batch.rows, tensors, part) for part in self._parts(tensors, good, unmasked)]
        return Window(packs, tuple(RowFailure(int(batch.rows[at]), *failure) for at, failure in failures.items()))

    def _agree(self, tensors: Mapping[str, RowTensors], failures: dict[int, Failure]) -> None:
        """Record ``wrong_shape`` for rows in which two axes of one name differ in size; fill sizes still open.

        ONNX: a name stands for one size within a graph. Where the graph itself goes on, as with sizes that broadcast,
        it declares its axes without a name or under different ones.
        """
        named: dict[str, list[tuple[str, int, Indices]]] = {}
        for value in self._signature.inputs:
            if value.name not in tensors:
                continue
            rows, dims = tensors[value.name], row_dims(value, self.mode)
            if dims is None or rows.shapes.shape[1] < len(dims):
                continue
            extra = rows.shapes.shape[1] - len(dims)
            for axis, dim in enumerate(dims):
                if isinstance(dim, str):
                    named.setdefault(dim, []).append((value.name, axis, rows.shapes[:, axis + extra]))
        for dim, places in named.items():
            first, axis, sizes = places[0]
            for name, at, others in places[1:]:
                sizes[sizes == UNKNOWN] = others[sizes == UNKNOWN]
                others[others == UNKNOWN] = sizes[others == UNKNOWN]
                for row in np.flatnonzero(sizes != others):
                    message = (
                        f"input {name!r}: axis {at} of the row is {others[row]}, "
                        f"and {dim!r} is {sizes[row]} by axis {axis} of input {first!r}"
                    )
                    failures.setdefault(int(row), (RowErrorCode.WRONG_SHAPE, message))
        for rows in tensors.values():
            rows.shapes[rows.shapes == UNKNOWN] = 0

    def _read(self, value: GraphValue, name: str, batch: RowBatch) -> RowTensors:
        if name not in batch.columns.schema.names:
            there = ", ".join(batch.columns.schema.names) or "none"
            raise InvalidInput(
                f"the input has no column {name!r}, which the graph wants as {value}; its columns are {there}",
                field=f"inputs.{value.name}",
            )
        column: Any = batch.columns.column(name)
        label = f"input {value.name!r}" + ("" if name == value.name else f" (column {name!r})")
        kind = tensor_kind(column.type)
        if kind is None or not lossless(kind.dtype, value.dtype):
            failure = (
                RowErrorCode.WRONG_TYPE,
                f"{label} is {value}; {column.type} does not convert to it without loss",
            )
            empty = np.zeros((len(column), 0), np.int64)
            failures: dict[int, Failure] = dict.fromkeys(range(len(column)), failure)
            return RowTensors(np.empty(0, value.dtype), np.zeros(len(column), np.int64), empty, failures)
        dims = row_dims(value, self.mode)
        if self.mode == "unit" and dims is not None and kind.dims is not None and len(kind.dims) == len(dims) + 1:
            dims = value.dims  # the row brings the axis of size one itself
        rows = read(column, None if dims is None else len(dims), label, unit=self.mode == "unit")
        if dims is not None:
            rows.fit(dims, label)
        if onnx_narrow.is_narrow(value.dtype):
            rows.narrow(value.dtype, label)
        if self._options.finite:
            rows.finite(label)
        if value.name in self._limits:
            rows.below(self._limits[value.name], label)
        return rows

    def _parts(self, tensors: Mapping[str, RowTensors], good: Indices, made: Collection[str]) -> list[Indices]:
        if not len(good):
            return []
        if self.stacks is False:
            # Run one by one, but handed to the sessions in pieces.
            return np.array_split(good, min(len(good), 4 * self._pool.size))
        # Once padding is known to change results, rows of one shape only.
        masks = Masks(self._signature, {}) if self.padding.proved is False else self._masks
        own = set(masks.of.values()) - set(made)
        return masks.parts(tensors, good, self._max_batch, PACK_BYTES, own)

    def _pack(self, rows: Indices, tensors: Mapping[str, RowTensors], items: Indices) -> Pack:
        def compute(run: Run) -> ResultBatch:
            batches: list[pa.RecordBatch] = []
            done: list[Indices] = []
            refused: list[tuple[int, str, str]] = []
            pieces = [items] if self.stacks is not False else [items[i : i + 1] for i in range(len(items))]
            for piece in pieces:
                parts, bad = bisect(
                    lambda part: self._compute(run, tensors, part), piece, lambda: self._still_works(run)
                )
                if len(parts) > 1 and not bad:
                    self._too_large(len(piece))
                done += [part for part, _ in parts]
                batches += [batch for _, batch in parts]
                refused += bad
            failures = tuple(RowFailure(int(rows[at]), code, message) for at, code, message in refused)
            if not done:
                return ResultBatch(np.empty(0, np.int64), None, failures)
            values = pa.concat_batches(batches)  # type: ignore[attr-defined]  # newer than the stubs
            return ResultBatch(rows[np.concatenate(done)], values, failures)

        return compute

    def _compute(self, run: Run, tensors: Mapping[str, RowTensors], items: Indices) -> pa.RecordBatch:
        if len(items) > 1 and self._masks.unequal(tensors, items):
            return self._padded(run, tensors, items)
        if len(items) > 1 and self.stacks is not False:
            outputs = self._run(run, tensors, items)
            if self._legitimate(run, tensors, items, outputs):
                return self._columns(outputs)
        return _joined([self._columns(self._alone(run, tensors, items[i : i + 1])) for i in range(len(items))])

    def _padded(self, run: Run, tensors: Mapping[str, RowTensors], items: Indices) -> pa.RecordBatch:
        """Rows of different size: together, or those of one size together."""
        alike = self._masks.alike(tensors, items)
        if self.stacks is not False and self.padding.may(lambda feed: self._fed(run, feed), tensors, items):
            outputs = self._run(run, tensors, items)
            if self._legitimate(run, tensors, items, outputs):
                sizes = [self._masks.sizes(tensors, int(items[part.start])) for part in alike]
                cut = [self._masks.cut([o[part] for o in outputs], s) for part, s in zip(alike, sizes, strict=True)]
                return _joined([self._columns(part) for part in cut])
        return _joined([self._compute(run, tensors, items[part]) for part in alike])

    def _run(self, run: Run, tensors: Mapping[str, RowTensors], items: Indices) -> list[Array]:
        """Graph outputs for the rows; for a graph whose row is the whole input, of the one row."""
        outputs = self._fed(run, feed := self._masks.gather(tensors, items))
        if self._sample is None and len(items) == 1:
            self._sample = {name: array.copy() for name, array in self._feed(feed).items()}
        return outputs

    def _feed(self, rows: Mapping[str, Array]) -> dict[str, Array]:
        """What the graph is given for rows that are stacked, [n, ...]."""
        feed = {}
        for value in self._signature.inputs:
            stacked = rows[value.name].astype(value.dtype, copy=False)
            if self.mode == "whole" or (self.mode == "unit" and stacked.ndim == len(value.dims or ()) + 1):
                stacked = stacked.reshape(stacked.shape[1:])  # of the one row
            if self._fixed is not None and len(stacked) < self._fixed:
                stacked = np.concatenate([stacked, np.repeat(stacked[-1:], self._fixed - len(stacked), axis=0)])
            feed[value.name] = stacked
        return feed

    def _fed(self, run: Run, rows: Mapping[str, Array]) -> list[Array]:
        outputs = run(self._feed(rows))
        if self._fixed is not None:
            n_rows = len(next(iter(rows.values())))
            outputs = [output[:n_rows] for output in outputs]  # what filled the batch up is no row
        self._count(runs=1)
        return outputs

    def _alone(self, run: Run, tensors: Mapping[str, RowTensors], item: Indices) -> list[Array]:
        """Outputs of one row, each with a leading axis of size one."""
        outputs = self._run(run, tensors, item)
        if self.mode == "whole":
            return [output[None] for output in outputs]
        for value, output in zip(self._signature.outputs, outputs, strict=True):
            if not output.ndim or len(output) != 1:
                raise InvalidJob(
                    f"the graph gives output {value.name!r} of shape {list(output.shape)} for one row, so its first "
                    "axis does not count rows; set it to 'whole', and let each row hold a whole input",
                    field="engine_options.row_mode",
                )
        return outputs

    def _legitimate(self, run: Run, tensors: Mapping[str, RowTensors], items: Indices, outputs: list[Array]) -> bool:
        """Whether stacking gives each row of the batch what it gets alone; and padding, where the rows differ in size.

        Checked by size on every batch, and by value: two rows that differ are run alone until they prove it, then a
        row at random (the one that is padded most) for every new shape and now and then (see
        :class:`.onnx_stacking.Doubt`). A graph that normalizes over its first axis, say, passes the one and fails the
        other. While nothing is proved (equal rows, results without numbers) the rows are run alone.
        """
        fits = all(output.ndim and len(output) == len(items) for output in outputs)
        padded = self._masks.unequal(tensors, items)
        with self._lock:
            proved = self.stacks is True
            probes = self._doubt.row(self._masks.kind(tensors, items), len(items)) if proved else []
        if padded and probes:
            probes = [self._masks.most_padded(tensors, items)]
        if fits and not proved:
            probes = self._telling(tensors, items)
        telling = len(probes) > 1
        for at in probes if fits else ():
            alone = self._alone(run, tensors, items[at : at + 1])
            found = [output[at : at + 1] for output in outputs]
            if padded:
                found = self._masks.cut(found, self._masks.sizes(tensors, int(items[at])))
            fits = fits and all(same(out, one) for out, one in zip(found, alone, strict=True))
            telling = telling and all(map(has_numbers, alone))
            self._count(compared_rows=1)
        return self._judged(fits, telling, len(items), padded=padded)

    def _judged(self, fits: bool, telling: bool, n_rows: int, *, padded: bool) -> bool:
        """Whether the batch's outputs are good, by what its comparison gave; remembered for the next."""
        if not fits and not padded and self._fixed is not None:
            raise InvalidJob(
                f"rows change each other's result in the graph's batches of {self._fixed}; set it to 'whole', and let "
                "each row hold a whole input",
                field="engine_options.row_mode",
            )
        with self._lock:
            told = self.stacks is False
            known = self.counts["padded_rows" if padded else "stacked_rows"]
            if not fits:
                # It may be the padding, or what was taken for proved: that has to be proved again.
                self.stacks = None if padded and self.stacks is not False else False
            elif telling and self.stacks is None:
                self.stacks = True
            good = fits and self.stacks is True and not (padded and self.padding.proved is False)
            self.counts["stacked_rows"] += n_rows if good else 0
            self.counts["padded_rows"] += n_rows if good and padded else 0
        if not fits and padded:
            self.padding.give_up(known)
        elif not fits and not told:
            self._notify(
                "rows change each other's result when they are stacked in this graph; each is run alone"
                + (f". {known} rows were stacked before that showed: run them again with max_batch 1" if known else "")
            )
        return good

    def _telling(self, tensors: Mapping[str, RowTensors], items: Indices) -> list[int]:
        """Two positions in the batch whose rows differ, of numbers where there are such; one if all rows are equal."""
        stacked = self._masks.gather(tensors, items)
        masks = set(self._masks.of.values())  # that their sizes differ tells nothing of what is in the rows
        return unlike([array for name, array in stacked.items() if name not in masks])

    def _columns(self, outputs: list[Array]) -> pa.RecordBatch:
        columns = {}
        for value, output in zip(self._signature.outputs, outputs, strict=True):
            try:
                columns[value.name] = to_arrow(output, self._types[value.name])
            except ValueError as error:
                raise InvalidJob(
                    f"the graph declares its output as {value} and gives something else: {error}"
                ) from error
        return record_batch(columns, self.result_schema())

    def _still_works(self, run: Run) -> bool:
        if self._sample is None:
            return True
        try:
            run(self._sample)
        except RunFailed:
            return False
        return True

    def _too_large(self, n_rows: int) -> None:
        with self._lock:
            if self._max_batch >= n_rows:
                self._max_batch = max(1, n_rows // 2)
                self.counts["batch_halvings"] += 1

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self.counts.update(numbers)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)  # type: ignore[attr-defined]
