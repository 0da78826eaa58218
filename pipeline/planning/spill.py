"""Rows that wait on disk in partitions: added in any order, read back one partition at a time, first in first out."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.objects.errors import explain
from storage.parquet.arrow_schemas import takeable
from storage.parquet.nested_arrays import cast, cast_batch

ROW, PARTITION = "__row", "__partition"
"""Columns that are put before the others: the number that each row came with, and its partition."""
FAN_OUT = 128
"""Most stretches of one round. Each has a schema of its own: with 8 MiB a round, one for every 60 KiB."""


class PartitionedSpill:
    """Partitions ``0`` to ``n - 1`` in one temporary file, which goes with the object, however the process ends.

    Rows are gathered in memory up to ``n_bytes`` bytes, then sorted by partition (which takes as much again) and
    appended to the file, compressed with LZ4. Each partition's rows of such a round are a stretch, which costs 16 bytes
    of memory and some hundred of the file. So more partitions than ``FAN_OUT`` are written as groups of neighbours, and
    a group is dealt out to a file of its own when the first of its partitions is taken.

    Raises :class:`~storage.errors.StorageFull` when the disk is full.
    """

    def __init__(self, schema: pa.Schema, n_partitions: int, n_bytes: int) -> None:
        self._given = schema
        self._schema = pa.schema([pa.field(ROW, pa.int64()), pa.field(PARTITION, pa.int64()), *takeable(schema)])
        self._limit = n_bytes
        self._n_partitions = n_partitions
        self._group = -(-n_partitions // FAN_OUT)
        """Partitions in a group."""
        self._file = tempfile.TemporaryFile(prefix="rowmill-rows-")  # noqa: SIM115 - lives as long as the object
        self._stretches = [array("q") for _ in range(-(-n_partitions // self._group))]
        """By group: where each stretch begins and how long it is, in turn."""
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        self._dealt: tuple[int, PartitionedSpill] | None = None
        """The group that was dealt out last."""

    def __enter__(self) -> PartitionedSpill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk's space back."""
        self._file.close()
        if self._dealt is not None:
            self._dealt[1].close()

    def put(self, rows: npt.NDArray[np.int64], partitions: npt.NDArray[np.int64], columns: pa.RecordBatch) -> None:
        """Add rows: their numbers, the partition of each, and their columns."""
        if not len(rows):
            return
        arrays = [cast(column, kind) for column, kind in zip(columns.columns, self._schema.types[2:], strict=True)]
        self._batches.append(
            pa.RecordBatch.from_arrays([pa.array(rows), pa.array(partitions), *arrays], schema=self._schema)
        )
        self._bytes += columns.nbytes
        if self._bytes >= self._limit:
            self._write_out()

    def take(self, partition: int) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
        """A partition's rows, in the order in which they came, a stretch at a time. Nothing may be put in afterwards.

        Neighbours are best taken one after the other, each to its end: what was dealt out is kept for one group.
        """
        self._write_out()
        group = partition // self._group
        if self._group == 1:
            for rows, _, table in self._read(group):
                yield rows, cast_batch(table, self._given)
            return
        first = group * self._group
        if self._dealt is None or self._dealt[0] != group:
            if self._dealt is not None:
                self._dealt[1].close()
            self._dealt = (
                group,
                PartitionedSpill(self._given, min(self._group, self._n_partitions - first), self._limit),
            )
            for rows, partitions, table in self._read(group):
                for batch in table.to_batches():
                    self._dealt[1].put(rows[: len(batch)], partitions[: len(batch)] - first, batch)
                    rows, partitions = rows[len(batch) :], partitions[len(batch) :]
        yield from self._dealt[1].take(partition - first)

    def _read(self, group: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], pa.Table]]:
        stretches = self._stretches[group]
        for begin, length in zip(stretches[::2], stretches[1::2], strict=True):
            self._file.seek(begin)
            table = pa.ipc.open_stream(pa.py_buffer(self._file.read(length))).read_all()
            # By position: the rows' own columns may have any names.
            own = list(range(2, table.num_columns))
            yield table.column(0).to_numpy(), table.column(1).to_numpy(), table.select(own)

    def _write_out(self) -> None:
        if not self._batches:
            return
        table = pa.Table.from_batches(self._batches, schema=self._schema)
        groups = table.column(1).to_numpy() // self._group
        order = np.argsort(groups, kind="stable")
        table, groups = table.take(order), groups[order]
        starts = np.flatnonzero(np.diff(groups, prepend=-1)).tolist()
        try:
            at = self._file.seek(0, 2)
            for low, high in zip(starts, [*starts[1:], len(groups)], strict=True):
                buffer = _stream(table.slice(low, high - low))
                self._file.write(buffer)
                self._stretches[groups[low]].extend((at, buffer.size))
                at += buffer.size
            self._file.flush()
        except OSError as error:
            raise explain(f"a temporary file in {tempfile.gettempdir()}", error, writing=True) or error from error
        self._batches, self._bytes = [], 0


def _stream(table: pa.Table) -> Any:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return sink.getvalue()
