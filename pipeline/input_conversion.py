"""JSONL, CSV and Arrow IPC become Parquet chunks below the job's work folder, streaming; a rerun is harmless."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pyarrow as pa

from pipeline import csv_input, jsonl_input, text_streams
from pipeline.input_formats import Format, Kind
from storage import arrow_schemas, locations, parquet
from storage.errors import InvalidInput
from storage.objects import ObjectInfo, ObjectStore
from storage.parquet import ParquetOutput
from storage.parquet_batches import readable, unfolded

CHUNK_BYTES = 256 * 2**20
"""Bytes in memory (not on disk) after which a chunk is closed."""
UNFOLDED_BYTES = 32 * 2**20
"""Of rows that are written at a time, with each value of a dictionary written out."""


def convert(store: ObjectStore, file: ObjectInfo, kind: Format, work_dir_uri: str, first: int) -> list[str]:
    """Write ``file``'s rows as chunks numbered from ``first`` on; returns their URIs, at least one.

    The names tell the file, its etag and the chunk's number: a chunk that is there already holds the same rows, and is
    left alone. Raises :class:`InvalidInput` with file, line and reason for content that cannot be read.
    """
    with _Chunks(store, file.uri, work_dir_uri, key_of(file), first) as chunks:
        for table in _tables(store, file.uri, kind):
            chunks.write(table)
    return chunks.uris


def key_of(file: ObjectInfo) -> str:
    """What the names of the file's chunks end in: it tells the file, and its etag."""
    return hashlib.sha256(f"{file.uri}\0{file.etag}\0{CHUNK_BYTES}".encode()).hexdigest()[:12]


def _tables(store: ObjectStore, uri: str, kind: Format) -> Iterator[pa.Table]:
    """The file's rows; at least one table, if an empty one, so that the columns are known."""
    if kind.kind is Kind.JSONL:
        yield from jsonl_input.tables(store, uri, kind.compression)
    elif kind.kind is Kind.CSV:
        yield from csv_input.tables(store, uri, kind.compression)
    else:
        yield from _ipc_tables(store, uri)


def _ipc_tables(store: ObjectStore, uri: str) -> Iterator[pa.Table]:
    with text_streams.opened(store, uri, None) as file:
        with readable(uri, InvalidInput, "it is not a readable Arrow IPC file"):
            reader: Any
            if file.read(6) == b"ARROW1":
                file.seek(0)
                reader = pa.ipc.open_file(file)
            else:
                file.seek(0)
                reader = pa.ipc.open_stream(file)
            yield reader.schema.empty_table()
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
                batch.validate(full=True)
            for piece in unfolded(batch, UNFOLDED_BYTES):
                yield pa.Table.from_batches([piece])


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
                columns.append(column.cast(field.type))
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
