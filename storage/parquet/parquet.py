"""Parquet: what the footer says, rows out in bounded batches, files in with checksums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import IO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyroaring import BitMap

from storage.errors import CorruptFile, InputChanged, InvalidInput, RowmillError
from storage.locations import protocol
from storage.objects.store import NewFile, ObjectStore, Written
from storage.parquet import arrow_schemas, footer_check, values
from storage.parquet.batches import Readable, conform, readable, row_groups, unreadable_columns, without_columns
from storage.parquet.nested_arrays import cast_batch
from storage.records import Slice, Source

RowIds = npt.NDArray[np.int64]

ROW_GROUP_ROWS = 65_536
ROW_GROUP_BYTES = 32 * 2**20
"""Row groups end at whichever comes first; the writer buffers one of them."""


@dataclass(frozen=True, slots=True)
class FileStats:
    """What a footer says. ``row_groups``: (rows, uncompressed bytes) of each.

    Dictionaries have indices wide enough for any number of values, and INT96 times a unit that holds all of them.
    ``orders``: the categories of columns that have ordered ones. ``unreadable``: why a column cannot be read, by its
    name; only of a file that was asked for with ``check``.
    """

    n_rows: int
    schema: pa.Schema
    row_groups: tuple[tuple[int, int], ...]
    unreadable: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, Sequence[values.Order]] = field(default_factory=dict)


def stats(store: ObjectStore, uri: str, *, check: bool = False) -> FileStats:
    """The footer's facts. Raises :class:`InvalidInput`, saying why, when this is no Parquet file.

    No data is read, except for what only data can tell: see ``storage.parquet.values``. With ``check``, for files of
    others: also which columns nobody can read, encrypted ones for instance.
    """
    with store.open(uri) as file, readable(uri, InvalidInput, "it is not a readable Parquet file"):
        try:
            parquet = pq.ParquetFile(file)
        except OSError:
            if footer_check.is_encrypted(file):
                raise InvalidInput(f"{uri}: its footer is encrypted; decrypt the file first", field="input") from None
            raise
        arrow_schemas.check(parquet.schema_arrow, uri)
        footer = parquet.metadata
        groups = (footer.row_group(i) for i in range(footer.num_row_groups))
        sizes = tuple((group.num_rows, max(0, group.total_byte_size)) for group in groups)
        unreadable: dict[str, str] = {}
        if check and not footer_check.is_safe(footer):
            unreadable = unreadable_columns(parquet)
            if not unreadable:
                raise InvalidInput(f"{uri}: its footer is damaged", field="input")
        schema = parquet.schema_arrow
        if check:
            schema, unfit = values.int96_units(parquet, file, unreadable)
            unreadable |= unfit | values.intervals(parquet)
        orders = values.category_orders(parquet, unreadable)
        return FileStats(footer.num_rows, arrow_schemas.with_wide_indices(schema), sizes, unreadable, orders)


def read(
    store: ObjectStore,
    sources: Mapping[int, Source],
    slices: Sequence[Slice],
    *,
    schema: pa.Schema,
    columns: Sequence[str],
    only: BitMap | None,
    batch_rows: int,
    batch_bytes: int,
) -> Iterator[tuple[RowIds, pa.RecordBatch]]:
    """The rows of ``slices``, in order, in batches of at most ``batch_rows`` rows and about ``batch_bytes`` bytes.

    Yields (``int64 [n]``: row indices that count through the slices; n rows of ``columns``, with ``schema``'s types).
    ``only`` leaves out all other indices. Columns that a file lacks come from its hive partition, or are null. A single
    row may exceed ``batch_bytes``. Text is not checked for being UTF-8.

    Raises :class:`InputChanged` when a file is not the one that was planned, :class:`InvalidInput` when it is damaged.
    """
    target = pa.schema([schema.field(name) for name in columns])
    start = 0
    for source_idx, group in groupby(slices, key=lambda item: item.source):
        pieces = []
        for item in group:
            if only is None or only.range_cardinality(start, start + item.row_n):
                pieces.append((start, item))
            start += item.row_n
        if pieces:
            yield from _read_file(store, sources[source_idx], pieces, target, only, batch_rows, batch_bytes)


def _read_file(
    store: ObjectStore,
    source: Source,
    pieces: Sequence[tuple[int, Slice]],
    target: pa.Schema,
    only: BitMap | None,
    batch_rows: int,
    batch_bytes: int,
) -> Iterator[tuple[RowIds, pa.RecordBatch]]:
    key = (source.uri, source.etag, tuple(target.names), tuple(map(str, target.types)), batch_rows, batch_bytes)
    _check_unchanged(store, source)
    reader: Readable | None = store.open_readers.take(key, pieces[0][1].row_lo)
    if reader is None:
        reader = _open(store, source, target, batch_rows, batch_bytes)
    try:
        for start, item in pieces:
            shift = start - item.row_lo
            groups = [
                group
                for group in row_groups(reader.footer, item.row_lo, item.row_lo + item.row_n)
                if only is None or only.range_cardinality(group.lo + shift, group.hi + shift)
            ]
            reader.plan(groups)
            for group in groups:
                where = f"{source.uri}, row group {group.number}"
                batches = reader.batches(group) if reader.columns else without_columns(group, batch_rows)
                for lo, raw in _unchanged(store, source, reader, _guarded(batches, where)):
                    rows, batch = _selected(lo + shift, raw, only)
                    if len(rows):
                        with readable(where, InvalidInput, "its values do not fit the column types of the job"):
                            batch = conform(batch, target, source.partition)
                        yield rows, batch
    except BaseException:
        reader.close()
        raise
    last = pieces[-1][1]
    end = last.row_lo + last.row_n
    if end < reader.footer.num_rows:
        # The next shard often goes on here: it need not decode, or fetch, the row group from its start.
        store.open_readers.put(key, end, reader)
    else:
        reader.close()


def _open(store: ObjectStore, source: Source, target: pa.Schema, batch_rows: int, batch_bytes: int) -> Readable:
    with ExitStack() as stack:
        file = stack.enter_context(closing(store.open(source.uri)))
        _check_version(source, getattr(file, "etag", None) or source.etag)
        with readable(source.uri, InvalidInput, "it is not a readable Parquet file"):
            reader = Readable(file, target.names, batch_rows, batch_bytes, target)
        stack.pop_all()
    return reader


def _guarded(
    batches: Iterator[tuple[int, pa.RecordBatch]], where: str, kind: type[RowmillError] = InvalidInput
) -> Iterator[tuple[int, pa.RecordBatch]]:
    while True:
        with readable(where, kind, "it is damaged"):
            item = next(batches, None)
        if item is None:
            return
        yield item


def _unchanged(
    store: ObjectStore, source: Source, reader: Readable, batches: Iterator[tuple[int, pa.RecordBatch]]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Hand on only what was read while the file was still the planned one.

    A local file may be written over while it is open, so each batch is checked; at a store, each row group, unless the
    store itself refuses to read on from another version.
    """
    try:
        for item in batches:
            if protocol(source.uri) == "file":
                _check_unchanged(store, source)
            yield item
    except InvalidInput:
        _check_unchanged(store, source)  # it looks damaged because it was overwritten
        raise
    if not reader.pinned:
        _check_unchanged(store, source)


def _check_unchanged(store: ObjectStore, source: Source) -> None:
    found = store.stat(source.uri)
    if found is None:
        raise InputChanged(f"input file {source.uri} is gone since the job was planned; submit a new job")
    _check_version(source, found.etag)


def _check_version(source: Source, etag: str) -> None:
    if etag != source.etag:
        raise InputChanged(
            f"input file {source.uri} was changed after the job was planned (it is {etag}, and was {source.etag}); "
            "submit a new job"
        )


def _selected(first: int, batch: pa.RecordBatch, only: BitMap | None) -> tuple[RowIds, pa.RecordBatch]:
    count = batch.num_rows
    if only is None or only.range_cardinality(first, first + count) == count:
        return np.arange(first, first + count, dtype=np.int64), batch
    rows = np.array((only & BitMap(range(first, first + count))).to_array(), dtype=np.int64)
    target = arrow_schemas.takeable(batch.schema)
    if target == batch.schema:
        return rows, batch.take(rows - first)
    return rows, cast_batch(cast_batch(batch, target).take(rows - first), batch.schema)


def scan(
    file: object, uri: str, *, batch_rows: int, batch_bytes: int
) -> tuple[pa.Schema, int, Iterator[pa.RecordBatch]]:
    """Schema, row count and all rows of a file of our own, columns by position; ``file`` is a reader or a buffer.

    Raises :class:`CorruptFile`, at once or while iterating.
    """
    with readable(uri, CorruptFile, "it is not a readable Parquet file"):
        reader = Readable(file, None, batch_rows, batch_bytes)

    def batches() -> Iterator[pa.RecordBatch]:
        groups = list(row_groups(reader.footer, 0, reader.footer.num_rows))
        reader.plan(groups)
        for group in groups:
            found = reader.batches(group)
            yield from (batch for _, batch in _guarded(found, f"{uri}, row group {group.number}", CorruptFile))

    return reader.schema, reader.footer.num_rows, batches()


def columns(store: ObjectStore, uri: str, names: Sequence[str], batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
    """Some columns of a file of our own, in batches. Raises :class:`CorruptFile` when it is gone or damaged."""
    if not store.exists(uri):
        raise CorruptFile(f"{uri} is gone")
    with store.open(uri) as file, readable(uri, CorruptFile, "it is damaged"):
        yield from pq.ParquetFile(file, page_checksum_verification=True).iter_batches(batch_rows, columns=list(names))


def writer(store: ObjectStore, uri: str, schema: pa.Schema, *, keep_existing: bool = False) -> ParquetOutput:
    """A Parquet file to write in a ``with`` block; published when it ends well, else it never was.

    zstd, page checksums, row groups of at most ``ROW_GROUP_ROWS`` rows and about ``ROW_GROUP_BYTES`` bytes.
    """
    return ParquetOutput(store.create(uri, on_conflict="keep" if keep_existing else "replace"), schema)


def _tried_as_dictionaries(schema: pa.Schema) -> list[str]:
    """The columns, by Parquet's paths, all but vectors: their numbers hardly repeat, and are looked up in vain."""
    names = {arrow_schemas.ITEM: "list.element", arrow_schemas.ENTRY: "key_value"}
    return [
        ".".join(names.get(name, name) for name in path)
        for path, kind in arrow_schemas.leaves(schema)
        if not (pa.types.is_floating(kind) and arrow_schemas.ITEM in path)
    ]


class ParquetOutput:
    """See :func:`writer`."""

    def __init__(self, file: NewFile, schema: pa.Schema) -> None:
        self._file = file
        self._schema = schema
        self._pending: list[pa.Table] = []
        self._rows = self._bytes = 0
        self.n_rows = 0
        self._footers: list[pq.FileMetaData] = []
        try:
            self._writer = pq.ParquetWriter(
                cast(IO[bytes], file),
                schema,
                compression="zstd",
                use_dictionary=cast(bool, _tried_as_dictionaries(schema)),  # the stubs know no list
                write_page_checksum=True,
                metadata_collector=self._footers,
            )
        except BaseException:
            file.close()
            raise

    @property
    def written(self) -> Written:
        """What was published. Only after a clean exit."""
        return self._file.written

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows of exactly the schema given."""
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        self._pending.append(table)
        self._rows += table.num_rows
        self._bytes += table.nbytes
        self.n_rows += table.num_rows
        if self._rows >= ROW_GROUP_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._write_out()

    def _write_out(self) -> None:
        if self._rows:
            groups = max(-(-self._rows // ROW_GROUP_ROWS), -(-self._bytes // ROW_GROUP_BYTES), 1)
            self._writer.write_table(pa.concat_tables(self._pending), row_group_size=-(-self._rows // groups))
        self._pending, self._rows, self._bytes = [], 0, 0

    def __enter__(self) -> ParquetOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon()
            self._file.__exit__(kind, error, trace)
            return
        try:
            self._write_out()
            self._writer.close()
            self._check()
        except BaseException as problem:
            self._abandon()
            self._file.__exit__(type(problem), problem, problem.__traceback__)
            raise
        self._file.__exit__(None, None, None)

    def _check(self) -> None:
        """Never publish a file that is read back as other than what was to be written."""
        (footer,) = self._footers
        found = footer.schema.to_arrow_schema()
        if found.names != self._schema.names or footer.num_rows != self.n_rows:
            raise RowmillError(f"{footer.num_rows} rows of {found.names} were written, of {self.n_rows} rows")
        for meant, stored in zip(self._schema, found, strict=True):
            if meant.type != stored.type:
                raise RowmillError(f"column {meant.name!r} is {meant.type}, and would be read back as {stored.type}")

    def _abandon(self) -> None:
        # Its file is thrown away; what matters is the error that led here. pyarrow raises a RuntimeError for the footer
        # that a broken writer has not got.
        with suppress(OSError, RuntimeError, pa.ArrowException, RowmillError):
            self._writer.close()
