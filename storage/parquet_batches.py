"""One Parquet file's rows as record batches that stay small, whatever the file holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import RowmillError
from storage.object_errors import explain

_STREAM_BYTES = 2**20
"""Bytes of each column chunk that are read ahead, instead of whole chunks."""
_MANY = 4
"""Times the byte limit that a batch might take before its dictionaries are kept until it is cut."""
_DICTIONARY = frozenset({"RLE_DICTIONARY", "PLAIN_DICTIONARY"})


@contextmanager
def readable(where: str, kind: type[RowmillError], what: str) -> Iterator[None]:
    """Turn pyarrow's complaints about a file into ``kind``, with the place and the reason."""
    try:
        yield
    except (RowmillError, MemoryError):
        raise
    except OSError as error:
        # pyarrow's own OSErrors (a damaged page) carry no errno; the system's do.
        if error.errno is not None:
            raise explain(where, error) or error from error
        raise kind(f"{where}: {what} ({_on_one_line(error)})") from error
    except pa.ArrowException as error:
        raise kind(f"{where}: {what} ({_on_one_line(error)})") from error


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True, slots=True)
class GroupRange:
    """Rows ``[lo, hi)`` of the file, all of row group ``number``, which begins at row ``first``."""

    number: int
    first: int
    lo: int
    hi: int


def row_groups(footer: pq.FileMetaData, lo: int, hi: int) -> Iterator[GroupRange]:
    """The parts of rows ``[lo, hi)``, row group by row group."""
    first = 0
    for number in range(footer.num_row_groups):
        end = first + footer.row_group(number).num_rows
        if max(lo, first) < min(hi, end):
            yield GroupRange(number, first, max(lo, first), min(hi, end))
        first = end


class Readable:
    """An open Parquet file. ``columns`` are those of the wanted top-level columns that it has (``None``: all).

    Batches get as many rows as the footer says fit into ``batch_bytes``. Where a dictionary lets a small chunk unfold
    into huge values, the footer's sizes prove nothing: such columns stay dictionaries until the batch was cut.
    """

    def __init__(self, file: Any, uri: str, columns: Sequence[str] | None, batch_rows: int, batch_bytes: int) -> None:
        self._batch_rows, self._batch_bytes = batch_rows, batch_bytes
        plain = pq.ParquetFile(file)
        self.footer = plain.metadata
        self.schema = plain.schema_arrow
        self.columns = self.schema.names if columns is None else [n for n in columns if n in self.schema.names]
        self._all = columns is None
        self._indices = self._wanted()
        self._folded = self._foldable()
        self._parquet = pq.ParquetFile(
            file,
            metadata=self.footer,
            read_dictionary=self._folded or None,
            buffer_size=_STREAM_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )

    def batches(self, group: GroupRange) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The group's rows in order: (row number in the file of the first, batch)."""
        position = group.first
        for batch in self._parquet.iter_batches(
            batch_size=self._rows_per_batch(group.number),
            row_groups=[group.number],
            columns=None if self._all else self.columns,
            use_threads=False,
        ):
            lo, position = position, position + batch.num_rows
            if position <= group.lo:
                continue
            if lo >= group.hi:
                return
            begin, end = max(lo, group.lo), min(position, group.hi)
            for at, piece in self._unfolded(batch.slice(begin - lo, end - begin)):
                yield begin + at, piece

    def _wanted(self) -> list[int]:
        paths = [self.footer.schema.column(i).path for i in range(self.footer.num_columns)]
        wanted = set(self.columns)
        # A column name may hold dots itself: "a.b" is asked for by its whole path.
        return [i for i, path in enumerate(paths) if self._all or path in wanted or path.split(".")[0] in wanted]

    def _chunks(self, number: int) -> Iterator[Any]:
        group = self.footer.row_group(number)
        return (group.column(i) for i in self._indices)

    def _rows_per_batch(self, number: int) -> int:
        rows = max(1, self.footer.row_group(number).num_rows)
        n_bytes = sum(max(0, chunk.total_uncompressed_size) for chunk in self._chunks(number))
        return int(max(1, min(self._batch_rows, self._batch_bytes * rows // max(1, n_bytes))))

    def _foldable(self) -> list[str]:
        folded: dict[str, None] = {}
        for number in range(self.footer.num_row_groups):
            rows = min(self._batch_rows, self.footer.row_group(number).num_rows)
            for chunk in self._chunks(number):
                name = chunk.path_in_schema
                if (
                    chunk.physical_type == "BYTE_ARRAY"
                    and _DICTIONARY.intersection(chunk.encodings)
                    # No value is longer than its chunk.
                    and chunk.total_uncompressed_size * rows > _MANY * self._batch_bytes
                    and self.schema.names.count(name) == 1
                    and _is_text(self.schema.field(name).type)
                ):
                    folded[name] = None
        return list(folded)

    def _unfolded(self, batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
        if not self._folded:
            yield 0, batch
            return
        lengths = np.zeros(batch.num_rows, dtype=np.int64)
        for name in self._folded:
            column: Any = batch.column(name)
            sizes = pc.fill_null(pc.binary_length(column.dictionary), 0).to_numpy(zero_copy_only=False)
            if len(sizes):
                indices = pc.fill_null(column.indices, 0).to_numpy(zero_copy_only=False)
                lengths += np.where(column.is_null().to_numpy(zero_copy_only=False), 0, sizes[indices])
        ends = np.cumsum(lengths)
        lo = 0
        while lo < batch.num_rows:
            before = int(ends[lo - 1]) if lo else 0
            hi = max(lo + 1, int(np.searchsorted(ends, before + self._batch_bytes, side="right")))
            piece = batch.slice(lo, hi - lo)
            arrays: list[Any] = list(piece.columns)
            for name in self._folded:
                at = piece.schema.get_field_index(name)
                arrays[at] = arrays[at].dictionary_decode()
            yield lo, pa.RecordBatch.from_arrays(arrays, names=piece.schema.names)
            lo = hi


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def without_columns(group: GroupRange, batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of no column, which still know how many rows they have: where only the partition is wanted."""
    for lo in range(group.lo, group.hi, batch_rows):
        count = min(batch_rows, group.hi - lo)
        yield lo, _empty_rows(count)


def _empty_rows(count: int) -> pa.RecordBatch:
    rows = pa.array([{}] * count, pa.struct([]))
    return pa.RecordBatch.from_struct_array(cast(pa.StructArray, rows))


def conform(batch: pa.RecordBatch, target: pa.Schema, partition: Mapping[str, str | None]) -> pa.RecordBatch:
    """The batch with exactly ``target``'s columns: cast, taken from the partition, or null."""
    if not target.names:
        return _empty_rows(batch.num_rows)
    arrays = []
    for field in target:
        at = batch.schema.get_field_index(field.name)
        if at >= 0:
            column = batch.column(at)
            arrays.append(column if column.type == field.type else column.cast(field.type))
        elif (value := partition.get(field.name)) is not None:
            arrays.append(pa.repeat(pa.scalar(value).cast(field.type), batch.num_rows))
        else:
            arrays.append(pa.nulls(batch.num_rows, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=target)
