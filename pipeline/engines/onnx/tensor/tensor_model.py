"""The task ``tensor``: rows of tensor columns through any graph, stacked where the graph allows it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engines.base import ResultBatch, RowBatch, RowFailure
from pipeline.engines.onnx.runtime import low_precision
from pipeline.engines.onnx.runtime.graph_model import GraphModel, runs
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.onnx.runtime.run import Array, BoundRunner, filled
from pipeline.engines.onnx.runtime.session_pool import SessionPool
from pipeline.engines.onnx.runtime.signature import Dim, GraphValue, RowMode, Signature, fixed_batch
from pipeline.engines.onnx.runtime.stream import Batch, Indices, PreparedRows, bisect, record_batch
from pipeline.engines.onnx.tensor import small_rows
from pipeline.engines.onnx.tensor.arrow_types import lossless, tensor_kind
from pipeline.engines.onnx.tensor.batch_check import BatchInvarianceCheck
from pipeline.engines.onnx.tensor.batching import Batching
from pipeline.engines.onnx.tensor.carried_state import CarriedState, Sequences
from pipeline.engines.onnx.tensor.from_arrow import read
from pipeline.engines.onnx.tensor.masks import Masks
from pipeline.engines.onnx.tensor.row_tensors import UNKNOWN, Failure, RowTensors
from pipeline.engines.onnx.tensor.to_arrow import column_type, retyped, to_arrow
from pipeline.engines.sequence_keys import keys_of
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
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


def tensor_results(signature: Signature, options: OnnxOptions) -> tuple[str, ...]:
    """The graph outputs that become columns: all but those that the next row gets."""
    carried = set(CarriedState(signature, options.state).output_of.values())
    return tuple(value.name for value in signature.outputs if value.name not in carried)


class TensorModel(GraphModel):
    """A loaded graph without any meaning of its own."""

    def __init__(
        self,
        signature: Signature,
        mode: RowMode,
        pool: SessionPool,
        options: OnnxOptions,
        notify: Callable[[str], None],
        limits: Mapping[str, int],
        *,
        small: bool = False,
    ) -> None:
        """``limits``: graph input → rows of the table that it indexes (see :func:`.onnx_graph.index_limits`).
        ``small``: whether its rows are (see :mod:`.small_rows`)."""
        super().__init__(pool, options)
        self._signature = signature
        self._limits = limits
        self.small_rows = small and not options.masks and not options.state
        self._fixed = fixed_batch(signature) if mode == "stack" else None
        most = small_rows.ROWS if self.small_rows and "max_batch" not in options.model_fields_set else options.max_batch
        self._max_batch = min(most, self._fixed or most)
        self._sample: dict[str, Array] | None = None
        self._mode = mode
        self._masks = Masks(signature, options.masks)
        self._masks.check(mode)
        self._carried = CarriedState(signature, options.state)
        self._carried.check(mode)
        self._batching = Batching(self._masks)
        self._invariance = BatchInvarianceCheck(mode, self._masks, self._fixed, notify, self.counts)
        names = tensor_results(signature, options)
        self._inputs = tuple(value for value in signature.inputs if value.name not in options.state)
        self._outputs = tuple(value for value in signature.outputs if value.name in names)
        fields = [pa.field(v.name, column_type(v.dtype, row_dims(v, mode))) for v in self._outputs]
        self._schema = pa.schema(fields)

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        """One column per graph output, under its own name."""
        tensors, outputs = bool(spec.tensor_columns), self._outputs
        kinds = [column_type(v.dtype, row_dims(v, self._mode), tensors=tensors) for v in outputs]
        return pa.schema([pa.field(value.name, kind) for value, kind in zip(outputs, kinds, strict=True)])

    def facts(self) -> dict[str, Any]:
        """For the engine's statistics."""
        check = self._invariance
        said = {"row_mode": self._mode, "stacked": bool(check.stacks), "padded": bool(check.padding.proved)}
        with self._lock:
            return said | dict(self.counts)

    def prepare(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Iterator[PreparedRows]:
        """A window per row batch: rows that fit the graph, grouped by their exact shapes, masked axes aside."""
        sequences = Sequences()
        for batch in batches:
            yield self._window(spec, batch, sequences)

    def _window(self, spec: JobSpec, batch: RowBatch, sequences: Sequences) -> PreparedRows:
        n = len(batch.rows)
        failures: dict[int, Failure] = {}
        tensors: dict[str, RowTensors] = {}
        made = made_here(spec, self._options, batch.columns.schema)
        for value in self._inputs:
            if value.name in made:
                continue
            tensors[value.name] = rows = self._read(value, column_of(spec, value.name), batch)
            for at, failure in rows.failures.items():
                failures.setdefault(at, failure)
        self._agree(tensors, failures)
        for mask, axis in made.items():
            tensors[mask] = self._masks.made(axis, tensors)
            failures = tensors[mask].failures | failures
        self._invariance.padding.announce(made)
        self.count(rows=n)
        if self._carried:
            return PreparedRows(self._steps(spec, batch, tensors, failures, sequences))
        good = np.setdiff1d(np.arange(n), np.fromiter(failures, np.int64, len(failures)))
        batches = [self._batch(spec, batch.rows, tensors, part) for part in self._parts(tensors, good, made)]
        return PreparedRows(
            batches, tuple(RowFailure(int(batch.rows[at]), *failure) for at, failure in failures.items())
        )

    def _agree(self, tensors: Mapping[str, RowTensors], failures: dict[int, Failure]) -> None:
        """Record ``wrong_shape`` for rows in which two axes of one name differ in size; fill sizes still open.

        ONNX: a name stands for one size within a graph. Where the graph itself goes on, as with sizes that broadcast,
        it declares its axes without a name or under different ones. A name that one shape has twice says nothing:
        some exporters give every axis the same.
        """
        named: dict[str, list[tuple[str, int, Indices]]] = {}
        loose = self._signature.loose_names()
        for value in self._signature.inputs:
            if value.name not in tensors:
                continue
            rows, dims = tensors[value.name], row_dims(value, self._mode)
            if dims is None or rows.shapes.shape[1] < len(dims):
                continue
            extra = rows.shapes.shape[1] - len(dims)
            for axis, dim in enumerate(dims):
                if isinstance(dim, str) and dim not in loose:
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
        dims = row_dims(value, self._mode)
        if self._mode == "unit" and dims is not None and kind.dims is not None and len(kind.dims) == len(dims) + 1:
            dims = value.dims  # the row brings the axis of size one itself
        rows = read(column, None if dims is None else len(dims), label, unit=self._mode == "unit")
        if dims is not None:
            rows.fit(dims, label)
        if low_precision.is_low_precision(value.dtype):
            rows.to_low_precision(value.dtype, label)
        if self._options.finite:
            rows.finite(label)
        if value.name in self._limits:
            rows.below(self._limits[value.name], label)
        return rows

    def _parts(self, tensors: Mapping[str, RowTensors], good: Indices, made: Collection[str]) -> list[Indices]:
        if not len(good):
            return []
        if self._invariance.stacks is False:
            # Run one by one, but handed to the sessions in pieces.
            return np.array_split(good, min(len(good), 4 * self._pool.size))
        # Once padding is known to change results, rows of one shape only.
        one_shape = self._invariance.padding.proved is False
        batching = Batching(Masks(self._signature, {})) if one_shape else self._batching
        return batching.parts(tensors, good, self._max_batch, PACK_BYTES, set(self._options.masks.values()) - set(made))

    def _batch(self, spec: JobSpec, rows: Indices, tensors: Mapping[str, RowTensors], items: Indices) -> Batch:
        schema = self.result_schema(spec)

        def compute(run: BoundRunner) -> ResultBatch:
            batches: list[pa.RecordBatch] = []
            done: list[Indices] = []
            refused: list[tuple[int, str, str]] = []
            pieces = [items] if self._invariance.stacks is not False else [items[i : i + 1] for i in range(len(items))]
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
            values = retyped(values, schema)
            return ResultBatch(rows[np.concatenate(done)], values, failures)

        return compute

    def _steps(
        self,
        spec: JobSpec,
        batch: RowBatch,
        tensors: Mapping[str, RowTensors],
        failures: Mapping[int, Failure],
        sequences: Sequences,
    ) -> list[Batch]:
        """The rows in order, each beginning where the row before it in its sequence ended. There is one lane, so that
        batches run in their order."""
        assert spec.sequence is not None
        keys = keys_of(batch.columns.column(spec.sequence))
        schema = self.result_schema(spec)

        def step(run: BoundRunner, at: int) -> pa.RecordBatch | Failure:
            key = keys[at]
            if key is None:
                return RowErrorCode.MISSING_VALUE, f"column {spec.sequence!r}, which names the row's sequence, is null"
            if sequences.states.get(key, {}) is None:
                return RowErrorCode.BROKEN_SEQUENCE, f"an earlier row of sequence {key!r} failed"
            if at in failures:
                sequences.states[key] = None
                return failures[at]
            done, refused = bisect(
                lambda item: self._step(run, tensors, item, sequences, key),
                np.array([at]),
                lambda: self._still_works(run),
            )
            if refused:
                sequences.states[key] = None
                return refused[0][1:]
            return done[0][1]

        def one_batch(items: Indices) -> Batch:
            def compute(run: BoundRunner) -> ResultBatch:
                found = [(int(batch.rows[at]), step(run, int(at))) for at in items]
                failed = tuple(RowFailure(row, *what) for row, what in found if isinstance(what, tuple))
                done = [(row, what) for row, what in found if not isinstance(what, tuple)]
                if not done:
                    return ResultBatch(np.empty(0, np.int64), None, failed)
                values = retyped(_joined([what for _, what in done]), schema)
                return ResultBatch(np.array([row for row, _ in done], np.int64), values, failed)

            return compute

        n = len(batch.rows)
        return [one_batch(np.arange(lo, min(lo + self._max_batch, n))) for lo in range(0, n, self._max_batch)]

    def _step(
        self, run: BoundRunner, tensors: Mapping[str, RowTensors], item: Indices, sequences: Sequences, key: object
    ) -> pa.RecordBatch:
        feed = self._feed({value.name: tensors[value.name].gather(item) for value in self._inputs})
        state = sequences.states.get(key) or self._carried.begin(self._mode, feed)
        if self._sample is None:
            self._sample = {name: array.copy() for name, array in (feed | state).items()}
        found = dict(zip((value.name for value in self._signature.outputs), run(feed | state), strict=True))
        self.count(runs=1)
        columns = self._columns(self._of_one_row([found[value.name] for value in self._outputs]))
        sequences.states[key] = {to: found[source].copy() for to, source in self._carried.output_of.items()}
        return columns

    def _compute(self, run: BoundRunner, tensors: Mapping[str, RowTensors], items: Indices) -> pa.RecordBatch:
        def alone(item: Indices) -> list[Array]:
            return self._alone(run, tensors, item)

        outputs = self._invariance.outputs(lambda rows: self._fed(run, rows), alone, tensors, items)
        if not self._batching.unequal(tensors, items):
            if outputs is not None:
                return self._columns(outputs)
            return _joined([self._columns(alone(items[i : i + 1])) for i in range(len(items))])
        found = []
        for part in self._batching.alike(tensors, items):
            if outputs is None:
                found.append(self._compute(run, tensors, items[part]))
            else:
                sizes = self._masks.sizes(tensors, int(items[part.start]))
                found.append(self._columns(self._masks.cut([output[part] for output in outputs], sizes)))
        return _joined(found)

    def _feed(self, rows: Mapping[str, Array]) -> dict[str, Array]:
        """What the graph is given for rows that are stacked, [n, ...]."""
        feed = {}
        for value in self._inputs:
            stacked = rows[value.name].astype(value.dtype, copy=False)
            if self._mode == "whole" or (self._mode == "unit" and stacked.ndim == len(value.dims or ()) + 1):
                stacked = stacked.reshape(stacked.shape[1:])  # of the one row
            feed[value.name] = filled(stacked, self._fixed)
        return feed

    def _fed(self, run: BoundRunner, rows: Mapping[str, Array]) -> list[Array]:
        outputs = run(self._feed(rows))
        if self._fixed is not None:
            n_rows = len(next(iter(rows.values())))
            outputs = [output[:n_rows] for output in outputs]  # what filled the batch up is no row
        self.count(runs=1)
        return outputs

    def _alone(self, run: BoundRunner, tensors: Mapping[str, RowTensors], item: Indices) -> list[Array]:
        """Outputs of one row, each with a leading axis of size one."""
        rows = self._batching.gather(tensors, item)
        outputs = self._fed(run, rows)
        if self._sample is None:
            self._sample = {name: array.copy() for name, array in self._feed(rows).items()}
        return self._of_one_row(outputs)

    def _of_one_row(self, outputs: list[Array]) -> list[Array]:
        if self._mode == "whole":
            return [output[None] for output in outputs]
        for value, output in zip(self._outputs, outputs, strict=True):
            if not output.ndim or len(output) != 1:
                raise InvalidJob(
                    f"the graph gives output {value.name!r} of shape {list(output.shape)} for one row, so its first "
                    "axis does not count rows; set it to 'whole', and let each row hold a whole input",
                    field="engine_options.row_mode",
                )
        return outputs

    def _columns(self, outputs: list[Array]) -> pa.RecordBatch:
        columns = {}
        for value, output in zip(self._outputs, outputs, strict=True):
            try:
                columns[value.name] = to_arrow(output, self._schema.field(value.name).type)
            except ValueError as error:
                raise InvalidJob(
                    f"the graph declares its output as {value} and gives something else: {error}"
                ) from error
        return record_batch(columns, self._schema)

    def _still_works(self, run: BoundRunner) -> bool:
        sample = self._sample
        return sample is None or runs(lambda: run(sample))

    def _too_large(self, n_rows: int) -> None:
        with self._lock:
            if self._max_batch >= n_rows:
                self._max_batch = max(1, n_rows // 2)
                self.counts["batch_halvings"] += 1


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)  # type: ignore[attr-defined]
