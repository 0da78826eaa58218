"""The layout of part files, and how a shard's parts become one ordered output file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyroaring import BitMap

from pipeline.inputs.input_rows import InputRows
from pipeline.inputs.schema import carried
from pipeline.output import merge
from pipeline.output.merge import Run
from pipeline.output.text_check import without_broken
from pipeline.spec.error_codes import RowErrorCode
from storage.errors import CorruptFile, RowmillError
from storage.objects.store import ObjectStore, Written
from storage.parquet import parquet
from storage.records import PartFile

ROW_COLUMN = "__row"
ERROR_TYPE = pa.struct([pa.field("code", pa.string()), pa.field("message", pa.string())])
ERROR_FIELD: pa.Field[Any] = pa.field("error", ERROR_TYPE)
"""Null where the row is fine. The type is fixed, never inferred from what happened to fail."""

_WHOLE_BYTES = 128 * 2**20
"""Bytes of compressed part files that are held in memory: a file within its share is fetched and hashed in one go, a
larger one is hashed first and then streamed."""
_SMALLEST_BATCH_BYTES = 256 * 2**10


class Failure(Protocol):
    """One failed row, as engines report it."""

    @property
    def row(self) -> int: ...
    @property
    def code(self) -> str: ...
    @property
    def message(self) -> str: ...


class Results(Protocol):
    """What engines yield: ``rows`` int64 [n], ``values`` n rows or ``None``, and failures."""

    @property
    def rows(self) -> npt.NDArray[np.int64]: ...
    @property
    def values(self) -> pa.RecordBatch | None: ...
    @property
    def failures(self) -> Sequence[Failure]: ...


@dataclass(frozen=True, slots=True)
class Assembled:
    """``failed``: indices within the shard; ``missing``: half-open ranges of indices that the file leaves out."""

    written: Written
    n_rows: int
    n_failed: int
    failed: BitMap
    missing: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class OutputColumns:
    """What an output has: ``keep`` of the input, ``results`` of the engine with ``prefix`` before their names."""

    keep: Sequence[str]
    results: pa.Schema
    prefix: str

    def schema(self, job_schema: pa.Schema) -> pa.Schema:
        """Layout of an output file: kept input columns, prefixed result columns, the error."""
        stored = [field.with_name(self.prefix + field.name) for field in list(_stored(self.results))[:-1]]
        fields = [*(job_schema.field(name) for name in self.keep), *stored, ERROR_FIELD]
        return pa.schema(fields, metadata=carried(job_schema.metadata, self.keep))


def part_schema(schema: pa.Schema) -> pa.Schema:
    """Layout of a part file: the row's index in the shard, the result columns, the error. Columns go by position."""
    return pa.schema([pa.field(ROW_COLUMN, pa.int64(), nullable=False), *_stored(schema)])


def _stored(schema: pa.Schema) -> pa.Schema:
    """The stored form of results and error: a failed row is null, whatever the engine promises of its columns."""
    return pa.schema([*(field.with_nullable(True) for field in schema), ERROR_FIELD])


def result_table(schema: pa.Schema, results: Sequence[Results]) -> pa.Table:
    """Results in any order as one table in :func:`part_schema`'s layout, sorted by row; failed rows are null.

    Raises :class:`RowmillError` when an engine's values do not have the types of ``schema``.
    """
    values = [_values(batch, schema) for batch in results if batch.values is not None]
    done = [np.asarray(batch.rows, dtype=np.int64) for batch in results if batch.values is not None]
    failures = [failure for batch in results for failure in batch.failures]
    n_done = sum(map(len, done))
    rows = np.concatenate([*done, np.array([failure.row for failure in failures], dtype=np.int64)])
    errors = pa.StructArray.from_arrays(
        [
            pa.array([None] * n_done + [str(failure.code) for failure in failures], pa.string()),
            pa.array([None] * n_done + [failure.message for failure in failures], pa.string()),
        ],
        fields=list(ERROR_TYPE),
        mask=pa.array(np.arange(len(rows)) < n_done),
    )
    columns: list[Any] = []
    for at, field in enumerate(schema):
        chunks = [batch.column(at) for batch in values] + [pa.nulls(len(failures), field.type)]
        columns.append(pa.chunked_array(chunks, type=field.type))
    table = pa.Table.from_arrays([pa.array(rows), *columns, errors], schema=part_schema(schema))
    return table if (rows[1:] >= rows[:-1]).all() else table.take(np.argsort(rows, kind="stable"))


def _values(batch: Results, schema: pa.Schema) -> pa.RecordBatch:
    values = batch.values
    assert values is not None
    if values.schema.names != schema.names or values.schema.types != schema.types:
        raise RowmillError(f"an engine returned columns {_types(values.schema)}, and had announced {_types(schema)}")
    return values


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def stored_result_schema(
    store: ObjectStore, parts: Sequence[PartFile], base: PartFile | None, keep: Sequence[str], prefix: str
) -> pa.Schema:
    """The engine's result schema (no prefix, no error), read back from a part file or from an assembled output.

    Raises :class:`CorruptFile` when there is neither.
    """
    if parts:
        return _between(parquet.stats(store, parts[0].uri).schema, 1, "")
    if base is not None:
        return _between(parquet.stats(store, base.uri).schema, len(keep), prefix)
    raise CorruptFile("a shard without any part file has no result columns to read back")


def _between(schema: pa.Schema, first: int, prefix: str) -> pa.Schema:
    fields = list(schema)[first:-1]
    return pa.schema([field.with_name(field.name.removeprefix(prefix)) for field in fields])


def assemble(
    rows: InputRows,
    target_uri: str,
    columns: OutputColumns,
    *,
    parts: Sequence[PartFile],
    base: PartFile | None,
    partial: bool = False,
    results: pa.Table | None = None,
) -> Assembled:
    """Merge part files into one file of a shard's ``rows`` in order: one output row for each input row.

    ``parts`` are oldest first: of a row that two of them hold, the later one counts. ``base`` is the output of an
    earlier generation and counts where no part holds a row. ``results`` are all rows of a shard that has no file yet,
    from :func:`result_table`. Kept columns are read from the input again. Memory: one
    batch of each part that covers the row being written, and a row group of the output.

    Raises :class:`CorruptFile` when a file is not what was flushed or, unless ``partial``, when a row is in none of
    them; the target is not written then.
    """
    row_n, keep = rows.n_rows, columns.keep
    files = ([base] if base is not None else []) + list(parts)
    held = BitMap().union(*(file.rows for file in files)) if files else BitMap()
    if results is not None:
        held = BitMap(results.column(0).to_numpy())
    if held and held.max() >= row_n:
        raise CorruptFile(f"a part file of a shard of {row_n} rows claims to hold row {held.max()}")
    missing = ranges(BitMap(range(row_n)) - held)
    if missing and not partial:
        low, high = missing[0]
        raise CorruptFile(f"no part file holds rows {low} to {high - 1} of a shard of {row_n} rows")

    stored = _stored(columns.results)
    share = replace(rows, batch_bytes=max(_SMALLEST_BATCH_BYTES, rows.batch_bytes // max(1, len(files))))
    whole = _WHOLE_BYTES // max(1, len(files))
    runs = []
    later = BitMap()
    for file in reversed(files):
        owned = file.rows - later
        later |= file.rows
        skip = len(keep) if file is base else None
        if owned:
            runs.append(Run(file.uri, owned, _reader(share, file, stored, skip, whole)))
    if results is not None:
        runs.append(Run(target_uri, held, _in_memory(results, stored, rows.batch_rows)))
    schema = columns.schema(rows.schema)
    failed = BitMap()
    n_rows = 0
    inputs = _Kept(rows.read(keep, held if missing else None) if keep else None)
    with parquet.writer(rows.store, target_uri, schema) as file_out:
        for ids, computed in merge.merge(runs, stored):
            kept, made = _readable(inputs.take(ids), keep, computed)
            bad = pc.is_valid(made.column(made.num_columns - 1)).to_numpy()
            failed |= BitMap(ids[bad].astype(np.uint32))
            file_out.write(pa.Table.from_arrays([*kept, *made.columns], schema=schema))
            n_rows += len(ids)
        if n_rows != len(held):
            raise CorruptFile(f"{len(held)} rows were flushed for {target_uri}, and {n_rows} were found")
        inputs.finish()
    return Assembled(file_out.written, n_rows, len(failed), failed, missing)


def _in_memory(
    results: pa.Table, stored: pa.Schema, batch_rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
    # An engine's batches may be small, and each step of the merge ends where one of them does.
    for batch in results.combine_chunks().to_batches(batch_rows):
        yield batch.column(0).to_numpy(), pa.RecordBatch.from_arrays(batch.columns[1:], schema=stored)


def _readable(
    kept: Sequence[pa.ChunkedArray[Any]], names: Sequence[str], results: pa.Table
) -> tuple[list[pa.ChunkedArray[Any]], pa.Table]:
    """Kept columns without text that is not UTF-8, and results that are an error where there was such text."""
    columns = []
    broken: dict[int, str] = {}
    for name, column in zip(names, kept, strict=True):
        cleaned, mask = without_broken(column)
        columns.append(cleaned)
        if mask is not None:
            for at in np.flatnonzero(mask).tolist():
                broken.setdefault(at, name)
    if broken:
        known = results.column(results.num_columns - 1)
        failures = [at for at in sorted(broken) if not known[at].is_valid]
        index = np.arange(len(results))
        index[failures] = len(results) + np.arange(len(failures))
        messages = [f"column {broken[at]!r} holds bytes that are not UTF-8" for at in failures]
        errors = pa.array([{"code": str(RowErrorCode.INVALID_UTF8), "message": text} for text in messages], ERROR_TYPE)
        nulls = [pa.nulls(len(failures), item.type) for item in list(results.schema)[:-1]]
        failed = pa.Table.from_arrays([*nulls, errors], schema=results.schema)
        results = pa.concat_tables([results, failed]).take(pa.array(index))
    return columns, results


def ranges(rows: BitMap) -> tuple[tuple[int, int], ...]:
    """The numbers as half-open ranges, in order."""
    numbers = np.array(rows.to_array(), dtype=np.int64)
    if not len(numbers):
        return ()
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    lows = numbers[np.concatenate([[0], breaks + 1])]
    highs = numbers[np.concatenate([breaks, [len(numbers) - 1]])] + 1
    return tuple(zip(lows.tolist(), highs.tolist(), strict=True))


def _reader(
    limits: InputRows, file: PartFile, stored: pa.Schema, skip: int | None, whole_bytes: int
) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
    """Rows and columns of a part file, from when it is first asked; checked against what the database says of it.

    ``limits`` says how much is read at a time. In a part file a column numbers the rows. An assembled file has ``skip``
    other columns before the results, and its rows are in order.
    """
    store = limits.store
    expected = np.array(file.rows.to_array(), dtype=np.int64)
    with _opened(store, file, whole_bytes) as reader:
        schema, n_rows, batches = parquet.scan(
            reader, file.uri, batch_rows=limits.batch_rows, batch_bytes=limits.batch_bytes
        )
        first = 1 if skip is None else skip
        if n_rows != len(expected):
            raise CorruptFile(f"{file.uri} has {n_rows} rows; {len(expected)} were flushed")
        if schema.types[first:] != stored.types:
            raise CorruptFile(f"{file.uri} has result columns {_types(schema)}, not {_types(stored)}")
        at = 0
        for batch in batches:
            rows = expected[at : at + batch.num_rows]
            if skip is None and not np.array_equal(batch.column(0).to_numpy(), rows):
                raise CorruptFile(f"{file.uri} does not hold the rows that were flushed to it")
            yield rows, pa.RecordBatch.from_arrays(batch.columns[first:], schema=stored)
            at += batch.num_rows


def _opened(store: ObjectStore, file: PartFile, whole_bytes: int) -> Any:
    """A reader over a file's verified content."""
    if file.n_bytes > whole_bytes:
        store.verify_content(file.uri, file.n_bytes, file.sha256)
        return store.open(file.uri)
    if not store.exists(file.uri):
        raise CorruptFile(f"{file.uri} is gone")
    data = store.read_bytes(file.uri)
    if len(data) != file.n_bytes or hashlib.sha256(data).hexdigest() != file.sha256:
        raise CorruptFile(f"{file.uri} is not what was flushed: its size or SHA-256 differs")
    return io.BytesIO(data)


class _Kept:
    """The kept input columns, handed out in step with the results."""

    def __init__(self, batches: Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]] | None) -> None:
        self._batches = batches
        self._rows = np.empty(0, dtype=np.int64)
        self._batch: pa.RecordBatch | None = None

    def take(self, rows: npt.NDArray[np.int64]) -> list[pa.ChunkedArray[Any]]:
        """The columns for exactly these rows, which must be the next ones."""
        if self._batches is None:
            return []
        taken: list[pa.RecordBatch] = []
        at = 0
        while at < len(rows):
            if self._batch is None or not len(self._rows):
                self._rows, self._batch = next(self._batches, (self._rows, None))
                if self._batch is None:
                    raise CorruptFile(f"the input ends before row {rows[at]} of the shard")
            count = min(len(self._rows), len(rows) - at)
            if not np.array_equal(self._rows[:count], rows[at : at + count]):
                raise CorruptFile(f"the input does not have row {rows[at]} of the shard where it should be")
            taken.append(self._batch.slice(0, count))
            self._rows, self._batch = self._rows[count:], self._batch.slice(count)
            at += count
        return list(pa.Table.from_batches(taken).columns)

    def finish(self) -> None:
        """Exhaust the reader, so that the next shard can continue in the same row group without decoding it again."""
        if self._batches is not None and next(self._batches, None) is not None:
            raise CorruptFile("the input holds more rows than the shard")
