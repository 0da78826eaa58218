"""Converts JSONL, CSV, Arrow IPC, Delta and Iceberg to Parquet chunks below the job's work folder, as a stream.

It may be run again: the chunks have the same names and contents.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Iterable, Iterator, Sequence, Set
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.inputs import table_formats
from pipeline.inputs.csv import CsvReader
from pipeline.inputs.formats import Format, Kind
from pipeline.inputs.jsonl import JsonlReader
from pipeline.spec.text_options import TextOptions
from storage import locations
from storage.errors import InvalidInput
from storage.objects.store import ObjectInfo, ObjectStore
from storage.parquet import arrow_schemas, parquet
from storage.parquet.batches import readable, unfolded
from storage.parquet.nested_arrays import cast, masked, with_types
from storage.parquet.parquet import ParquetOutput

CHUNK_BYTES = 256 * 2**20
"""Bytes in memory (not on disk) after which a chunk is closed."""
KEY_CHARS = 12
UNFOLDED_BYTES = 32 * 2**20
"""Of rows that are written at a time, with each value of a dictionary written out."""


def key_of(file: ObjectInfo) -> str:
    """What the names of the file's chunks tell of the file: it, and its etag."""
    return hashlib.sha256(f"{file.uri}\0{file.etag}\0{CHUNK_BYTES}".encode()).hexdigest()[:KEY_CHARS]


class Converter:
    """Turns the files of one input that are not Parquet into chunks below ``work_dir_uri``.

    Types of text files are decided over all of them: ``survey`` the files, then ``convert`` each. Columns that the job
    neither reads nor keeps are left out. ``unreadable``: why a column cannot be read, by its name.
    """

    def __init__(self, store: ObjectStore, options: TextOptions, work_dir_uri: str) -> None:
        self._store, self._options, self._work_dir = store, options, work_dir_uri
        self._csv, self._jsonl = CsvReader(store, options), JsonlReader(store, options)
        self._left_out: dict[str, pa.Field[Any]] = {}
        self.unreadable: dict[str, str] = {}

    def survey(self, files: Iterable[tuple[ObjectInfo, Format]]) -> None:
        """Read all text files. Raises :class:`InvalidInput` with file, line and reason for what cannot be read."""
        kinds = set()
        for file, kind in files:
            kinds.add(kind.kind)
            if kind.kind is Kind.CSV:
                self._csv.survey(file.uri, kind.compression)
            elif kind.kind is Kind.JSONL:
                self._jsonl.survey(file.uri, kind.compression)
        self._refuse_idle_options(kinds)
        self._csv.check()
        self.unreadable.update({name: f"{uri} (two columns have that name)" for name, uri in self._csv.twice.items()})

    @property
    def left_out(self) -> pa.Schema:
        """Columns that are in no chunk, because nobody asked for them or nobody can read them."""
        schemas = [self._csv.schema, self._jsonl.schema]
        texts = {item.name: item for schema in schemas for item in schema}
        fields = {n: i for n, i in texts.items() if not self._options.wants(n) or n in self.unreadable}
        return pa.schema((self._left_out | fields).values())

    def convert(self, file: ObjectInfo, kind: Format, first: int) -> list[str]:
        """Write ``file``'s rows as chunks numbered from ``first`` on; returns their URIs, at least one.

        The names tell the file, its etag, the columns and the chunk's number: a chunk that is there already holds the
        same rows, and is left alone. Raises :class:`InvalidInput`.
        """
        tables = self._tables(file, kind)
        empty = next(tables)
        # The types of text are those of all files, so that they may have changed when the file has not.
        types = hashlib.sha256(empty.schema.serialize().to_pybytes()).hexdigest()[:6]
        with _Chunks(self._store, file.uri, self._work_dir, key_of(file) + types, first) as chunks:
            chunks.write(empty)
            for table in tables:
                chunks.write(table)
        return chunks.uris

    def _tables(self, file: ObjectInfo, kind: Format) -> Iterator[pa.Table]:
        """The file's rows, after an empty table that tells the columns."""
        uri = file.uri
        if kind.kind is Kind.JSONL:
            yield from self._jsonl.tables(uri, kind.compression)
        elif kind.kind is Kind.CSV:
            yield from self._csv.tables(uri, kind.compression)
        elif kind.kind is Kind.IPC:
            yield from self._ipc_tables(uri)
        elif kind.kind in (Kind.DELTA, Kind.ICEBERG):
            yield from table_formats.tables(uri, file.etag, kind.kind)
        else:
            raise AssertionError(f"{kind.kind} has no reader here")

    def _refuse_idle_options(self, kinds: Set[Kind]) -> None:
        """Raise :class:`InvalidInput` for an option that no file of the input could follow."""
        options = self._options
        if options.encoding is not None and not kinds & {Kind.CSV, Kind.JSONL}:
            raise InvalidInput("it is for CSV and JSONL, and the input holds neither; leave it out", field="encoding")
        csv = {
            "csv_delimiter": options.csv_delimiter is not None,
            "csv_types": options.csv_types != "auto",
            "csv_schema": bool(options.csv_schema),
        }
        given = [name for name, is_given in csv.items() if is_given]
        if given and Kind.CSV not in kinds:
            raise InvalidInput("it is for CSV, and the input holds none; leave it out", field=given[0])

    def _ipc_tables(self, uri: str) -> Iterator[pa.Table]:
        with self._store.open(uri) as opened_file:
            file: Any = opened_file
            with readable(uri, InvalidInput, "it is not a readable Arrow IPC file"):
                reader: Any
                if file.read(6) == b"ARROW1":
                    file.seek(0)
                    reader = pa.ipc.open_file(file)
                else:
                    file.seek(0)
                    reader = pa.ipc.open_stream(file)
                positions = self._ipc_positions(uri, reader.schema)
                schema = _plain_schema(reader.schema, positions)
                yield schema.empty_table()
                batches = (
                    (reader.get_batch(i) for i in range(reader.num_record_batches))
                    if isinstance(reader, pa.ipc.RecordBatchFileReader)
                    else iter(reader)
                )
            while True:
                with readable(uri, InvalidInput, "it is damaged"):
                    batch = next(batches, None)
                    if batch is None:
                        return
                    # Offsets that lead out of a buffer would end the process as soon as somebody follows them.
                    batch = _valid(batch)
                for piece in unfolded(batch, UNFOLDED_BYTES):
                    yield _plain(piece, positions, schema)

    def _ipc_positions(self, uri: str, schema: pa.Schema) -> list[int]:
        """Of the columns that are read: wanted, the only ones of their name, of types that Parquet has."""
        arrow_schemas.check(schema, uri)
        positions = []
        for at, item in enumerate(schema):
            kind = _plain_type(item.type)
            if schema.names.count(item.name) > 1:
                self.unreadable.setdefault(item.name, f"{uri} (two columns have that name)")
            elif not arrow_schemas.has_parquet_type(kind):
                self.unreadable.setdefault(item.name, f"{uri} (it is {kind}, which Parquet does not have)")
            elif self._options.wants(item.name):
                positions.append(at)
                continue
            self._left_out.setdefault(item.name, item.with_type(kind))
        # At least one column, so that the rows can be counted.
        return positions or [at for at, t in enumerate(schema.types) if arrow_schemas.has_parquet_type(t)][:1]


def _plain_type(kind: Any) -> Any:
    return kind.value_type if isinstance(kind, pa.RunEndEncodedType) else kind


def _valid(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, checked. Text that is not UTF-8 is left to its row, as an error. Raises ``pa.ArrowInvalid``.

    What lies below a null struct or list may be anything: pyarrow leaves an index into no category at all there.
    """
    batch.validate()  # sizes of buffers, on which the rest relies
    found = with_types(batch, arrow_schemas.as_bytes(batch.schema))
    try:
        found.validate(full=True)
    except pa.ArrowInvalid:
        found = pa.RecordBatch.from_arrays([masked(column) for column in found.columns], schema=found.schema)
        found.validate(full=True)
        return with_types(found, batch.schema)
    return batch


def _plain_schema(schema: pa.Schema, positions: Sequence[int]) -> pa.Schema:
    """The fields at ``positions``, run ends decoded."""
    fields = [schema.field(at).with_type(_plain_type(schema.field(at).type)) for at in positions]
    return pa.schema(fields, metadata=typing.cast(Any, schema.metadata))


def _plain(batch: pa.RecordBatch, positions: Sequence[int], schema: pa.Schema) -> pa.Table:
    """The columns at ``positions``, as ``schema`` has them."""
    columns = [
        pc.call_function("run_end_decode", [column]) if isinstance(column, pa.RunEndEncodedArray) else column
        for column in map(batch.column, positions)
    ]
    return pa.Table.from_arrays(columns, schema=schema)


class _Chunks:
    """Parquet files of about ``CHUNK_BYTES`` each, written one after another."""

    def __init__(self, store: ObjectStore, origin: str, work_dir_uri: str, key: str, first: int) -> None:
        self._store, self._origin, self._work_dir, self._key = store, origin, work_dir_uri, key
        self._first = first
        self._open: ParquetOutput | None = None
        self._bytes = 0
        self.uris: list[str] = []

    def write(self, table: pa.Table) -> None:
        try:
            if self._open is None:
                arrow_schemas.check(table.schema, self._origin)
                uri = locations.chunk_in(self._work_dir, self._first + len(self.uris), self._key)
                schema = arrow_schemas.as_stored(table.schema)
                self._open = parquet.writer(self._store, uri, schema, keep_existing=True)
                self.uris.append(uri)
            self._open.write(self._cast(table))
        except pa.ArrowNotImplementedError as error:
            raise InvalidInput(f"{self._origin} holds what Parquet cannot: {error}", field="input") from error
        self._bytes += table.nbytes
        if self._bytes >= CHUNK_BYTES:
            self._close(None)

    def _cast(self, table: pa.Table) -> pa.Table:
        schema = arrow_schemas.as_stored(table.schema)
        if schema == table.schema:
            return table
        columns: list[Any] = []
        for field, column in zip(schema, table.columns, strict=True):
            try:
                columns.append(cast(column, field.type))
            except pa.ArrowNotImplementedError as error:
                raise InvalidInput(
                    f"{self._origin}: column {field.name!r} is {column.type}, which cannot be made {field.type}, as "
                    f"Parquet stores it ({error}); write it as lists",
                    field="input",
                ) from error
            except pa.ArrowInvalid as error:
                raise InvalidInput(
                    f"{self._origin}: column {field.name!r} is {column.type}, and Parquet stores that as {field.type}, "
                    f"which does not hold its values ({error})",
                    field="input",
                ) from error
        return pa.Table.from_arrays(columns, schema=schema)

    def _close(self, error: BaseException | None) -> None:
        chunk, self._open, self._bytes = self._open, None, 0
        if chunk is not None:
            chunk.__exit__(type(error) if error else None, error, None)

    def __enter__(self) -> _Chunks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)
