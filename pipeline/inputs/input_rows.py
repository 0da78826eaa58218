"""Rows of a job's input, of one shard or of all of them, and how much of them is read at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyroaring import BitMap

from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.parquet.parquet import RowIds
from storage.records import Slice, Source


@dataclass(frozen=True, slots=True)
class InputRows:
    """The rows of ``slices``, in order. ``sources`` are the files by number, ``schema`` the one schema of all of them.

    At most ``batch_rows`` rows and about ``batch_bytes`` uncompressed bytes are read at a time.
    """

    store: ObjectStore
    sources: Mapping[int, Source]
    slices: Sequence[Slice]
    schema: pa.Schema
    batch_rows: int
    batch_bytes: int

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        return sum(item.row_n for item in self.slices)

    def read(self, columns: Sequence[str], only: BitMap | None = None) -> Iterator[tuple[RowIds, pa.RecordBatch]]:
        """``int64 [n]`` indices that count through the slices, and n rows of ``columns``; see :func:`parquet.read`.

        ``only`` leaves out all other indices. Raises :class:`InputChanged` when a file is not the one that was planned,
        :class:`InvalidInput` when it is damaged.
        """
        return parquet.read(
            self.store,
            self.sources,
            self.slices,
            schema=self.schema,
            columns=columns,
            only=only,
            batch_rows=self.batch_rows,
            batch_bytes=self.batch_bytes,
        )
