"""Rows waiting on disk, in piles: put in as they come, taken out pile by pile, in the order they were put in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.object_errors import explain

ROW = "__row"
"""The column that is put before the others: the number that each row came with."""


def takeable(schema: pa.Schema) -> pa.Schema:
    """The same columns in types that Arrow can gather rows of, whatever dictionaries their batches have."""
    fields: list[Any] = [field.with_type(_takeable(field.type)) for field in schema]
    return pa.schema(fields, metadata=cast(Any, schema.metadata))


def _takeable(kind: Any) -> Any:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(pa.int32(), _takeable(kind.value_type), kind.ordered)
    return kind


class RowSpill:
    """Piles ``0`` to ``n - 1`` in one temporary file, which goes with the object, however the process ends.

    Rows are gathered in memory up to ``n_bytes`` bytes, then sorted by pile (which takes as much again) and appended to
    the file, compressed with LZ4. Where each stretch of a pile begins is kept in memory: about 100 bytes for each pile
    and ``n_bytes`` bytes of rows. Raises :class:`~storage.errors.StorageFull` when the disk is full.
    """

    def __init__(self, schema: pa.Schema, n_piles: int, n_bytes: int) -> None:
        self._given = schema
        self._schema = pa.schema([pa.field(ROW, pa.int64()), *takeable(schema)])
        self._limit = n_bytes
        self._file = tempfile.TemporaryFile(prefix="rowmill-rows-")  # noqa: SIM115 - lives as long as the object
        self._stretches: list[list[tuple[int, int]]] = [[] for _ in range(n_piles)]
        self._batches: list[pa.RecordBatch] = []
        self._piles: list[npt.NDArray[np.int64]] = []
        self._bytes = 0

    def __enter__(self) -> RowSpill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def put(self, rows: npt.NDArray[np.int64], piles: npt.NDArray[np.int64], columns: pa.RecordBatch) -> None:
        """Add rows: their numbers, the pile of each, and their columns."""
        if not len(rows):
            return
        arrays = [
            column.cast(field.type) for column, field in zip(columns.columns, list(self._schema)[1:], strict=True)
        ]
        self._batches.append(pa.RecordBatch.from_arrays([pa.array(rows), *arrays], schema=self._schema))
        self._piles.append(piles)
        self._bytes += columns.nbytes
        if self._bytes >= self._limit:
            self._write_out()

    def take(self, pile: int) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
        """A pile's rows, in the order in which they came, a stretch at a time. Nothing may be put in afterwards."""
        self._write_out()
        for begin, length in self._stretches[pile]:
            self._file.seek(begin)
            table = pa.ipc.open_stream(pa.py_buffer(self._file.read(length))).read_all()
            yield table.column(0).to_numpy(), table.drop_columns([ROW]).cast(self._given)

    def _write_out(self) -> None:
        if not self._batches:
            return
        table = pa.Table.from_batches(self._batches, schema=self._schema)
        piles = np.concatenate(self._piles)
        order = np.argsort(piles, kind="stable")
        table, piles = table.take(order), piles[order]
        starts = np.flatnonzero(np.diff(piles, prepend=-1)).tolist()
        try:
            at = self._file.seek(0, 2)
            for low, high in zip(starts, [*starts[1:], len(piles)], strict=True):
                buffer = _stream(table.slice(low, high - low))
                self._file.write(buffer)
                self._stretches[piles[low]].append((at, buffer.size))
                at += buffer.size
            self._file.flush()
        except OSError as error:
            raise explain(f"a temporary file in {tempfile.gettempdir()}", error, writing=True) or error from error
        self._batches, self._piles, self._bytes = [], [], 0


def _stream(table: pa.Table) -> Any:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return sink.getvalue()
