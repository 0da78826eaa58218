"""One Parquet file's rows as record batches that stay small, whatever the file holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import RowmillError
from storage.objects.errors import explain
from storage.parquet import arrow_schemas, nested_arrays
from storage.parquet.broken_dictionaries import healed, is_refusal, plain_batches

_STREAM_BYTES = (64 * 2**10, 2**20)
"""Least and most bytes of each column chunk that are read ahead, instead of whole chunks."""
_FEW_ROWS = 256
"""Rows that are decoded to see a dictionary, which comes with the first of them that has a value."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}
"""Bytes that a value takes in memory at least; of text, its offset."""
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
    except UnicodeDecodeError as error:
        raise kind(f"{where}: {what} (a name or text in it is not UTF-8: {error.object[:80]!r})") from error
    except pa.ArrowException as error:
        raise kind(f"{where}: {what} ({_on_one_line(error)})") from error


def unreadable_columns(parquet: pq.ParquetFile) -> dict[str, str]:
    """Why a top-level column cannot be read, by its name. Reads the first value of each column chunk.

    Never looks at a column chunk's metadata itself: see ``storage.parquet.footer_check``.
    """
    found: dict[str, str] = {}
    names = set(parquet.schema_arrow.names)
    for index in range(parquet.metadata.num_columns):
        path = parquet.metadata.schema.column(index).path
        for number in range(parquet.metadata.num_row_groups):
            try:
                next(parquet.iter_batches(batch_size=1, row_groups=[number], columns=[path], use_threads=False), None)
            except (OSError, pa.ArrowException) as error:
                found.setdefault(path if path in names else path.split(".")[0], _on_one_line(error))
    return found


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

    Batches get as many rows as surely fit into ``batch_bytes``: by the footer's sizes and, where a dictionary lets a
    small chunk unfold into huge values, by the longest value of that dictionary. That counts too for columns that stay
    dictionaries in memory: who reads them unfolds them. With ``target``, INT96 times are read
    in its unit: in microseconds they reach beyond the year 2262.
    """

    def __init__(
        self,
        file: Any,
        columns: Sequence[str] | None,
        batch_rows: int,
        batch_bytes: int,
        target: pa.Schema | None = None,
    ) -> None:
        self._file = file
        self._batch_rows, self._batch_bytes = batch_rows, batch_bytes
        plain = pq.ParquetFile(file)
        self.footer = plain.metadata
        self.schema = plain.schema_arrow
        self.columns = self.schema.names if columns is None else [n for n in columns if n in self.schema.names]
        self._all = columns is None
        self._indices = self._wanted()
        micros = self._in_microseconds(target)
        self._parts = [
            (self._opened((), unit), names)
            for unit, names in (
                (None, [name for name in self.columns if name not in micros]),
                ("us", [name for name in self.columns if name in micros]),
            )
            if names or (unit is None and self._all)
        ]
        self._cursor: _Cursor | None = None

    def plan(self, groups: Iterable[GroupRange]) -> None:
        """Tell a remote file which bytes will be read: the wanted columns of these groups, and nothing else."""
        tell = getattr(self._file, "plan", None)
        if tell is not None:
            chunks = [chunk for group in groups for chunk in self._chunks(group.number)]
            tell(map(_place, chunks), streams=len(self._indices), limit=self._batch_bytes)

    def batches(self, group: GroupRange) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The group's rows in order: (row number in the file of the first, batch).

        A group can only be decoded from its start; a call that continues where the last one ended goes on from there.
        """
        cursor = self._cursor
        if cursor is None or cursor.number != group.number or cursor.position > group.lo:
            cursor = self._cursor = _Cursor(group.number, group.first, self._decoded(group.number))
        yield from cursor.read(group.lo, group.hi)

    def _decoded(self, number: int) -> Iterator[pa.RecordBatch]:
        rows = self._rows_per_batch(number)
        found = []
        for parquet, names in self._parts:
            batches = parquet.iter_batches(
                batch_size=rows, row_groups=[number], columns=None if self._all else names, use_threads=False
            )
            plain = partial(plain_batches, self._file, self.footer, self.schema, names, number, rows)
            found.append(healed(batches, plain))
        if len(found) == 1:
            yield from found[0]
            return
        for parts in zip(*found, strict=True):
            columns = {name: batch.column(name) for batch in parts for name in batch.schema.names}
            yield pa.RecordBatch.from_pydict(columns)

    def _in_microseconds(self, target: pa.Schema | None) -> set[str]:
        """The columns of INT96 times that are not to be read in nanoseconds, which is what pyarrow would do."""
        wanted = dict(arrow_schemas.leaves(target)) if target is not None else {}
        schema = self.footer.schema
        found = set()
        for index, (path, kind) in enumerate(arrow_schemas.leaves(self.schema) if wanted else ()):
            if path in wanted and pa.types.is_timestamp(kind) and schema.column(index).physical_type == "INT96":
                goal = wanted[path]
                found |= {path[0]} if not pa.types.is_timestamp(goal) or goal.unit != "ns" else set()
        return found

    @property
    def pinned(self) -> bool:
        """Whether every byte is sure to be of one version of the file."""
        return getattr(self._file, "etag", None) is not None

    def close(self) -> None:
        self._cursor = None
        self._file.close()

    def _chunks(self, number: int) -> Iterator[Any]:
        group = self.footer.row_group(number)
        return (group.column(index) for index in self._indices)

    def _opened(self, dictionaries: Sequence[str], int96_unit: str | None = None) -> pq.ParquetFile:
        return pq.ParquetFile(
            self._file,
            metadata=self.footer,
            coerce_int96_timestamp_unit=int96_unit,
            read_dictionary=list(dictionaries) or None,
            buffer_size=min(max(self._batch_bytes // max(1, len(self._indices)), _STREAM_BYTES[0]), _STREAM_BYTES[1]),
            pre_buffer=False,
            page_checksum_verification=True,
        )

    def _wanted(self) -> list[int]:
        paths = [self.footer.schema.column(i).path for i in range(self.footer.num_columns)]
        wanted = set(self.columns)
        # A column name may hold dots itself: "a.b" is asked for by its whole path.
        return [i for i, path in enumerate(paths) if self._all or path in wanted or path.split(".")[0] in wanted]

    def _rows_per_batch(self, number: int) -> int:
        """Rows of the group that stay within the limit: on average by the footer, at the worst by dictionaries.

        A repeated value costs next to nothing in the file, so a chunk counts for its values' full width at least.
        """
        group = self.footer.row_group(number)
        rows = max(1, group.num_rows)
        n_bytes = worst = 0
        for index in self._indices:
            chunk = group.column(index)
            stored, values = max(0, chunk.total_uncompressed_size), max(0, chunk.num_values)
            n_bytes += max(stored, values * self._width(index, chunk.physical_type))
            if chunk.physical_type == "BYTE_ARRAY" and _DICTIONARY.intersection(chunk.encodings):
                per_row = -(-values // rows)
                # No value is longer than its chunk: most chunks need no look at their dictionary.
                if stored * per_row * min(rows, self._batch_rows) > self._batch_bytes:
                    few = max(1, min(self._batch_rows, self._batch_bytes // max(1, 4 * per_row), _FEW_ROWS))
                    try:
                        worst += per_row * self._longest_in_dictionary(number, chunk.path_in_schema, few)
                    except pa.ArrowInvalid as error:
                        if not is_refusal(error):
                            raise
                        worst += per_row * stored
        fits = min(self._batch_bytes * rows // max(1, n_bytes), self._batch_bytes // max(1, worst))
        return int(max(1, min(self._batch_rows, fits)))

    def _width(self, index: int, physical_type: str) -> int:
        if physical_type == "FIXED_LEN_BYTE_ARRAY":
            return max(0, self.footer.schema.column(index).length or 0)
        return _WIDTHS.get(physical_type, 0)

    @cached_property
    def _folded(self) -> pq.ParquetFile:
        """The file with all its text as dictionaries."""
        return self._opened([self.footer.schema.column(index).path for index in self._indices])

    def _longest_in_dictionary(self, number: int, path: str, few: int) -> int:
        """Bytes of the longest value that the chunk's dictionary page holds; 0 when it has none.

        The dictionary comes with the first value, which is in the first ``few`` rows unless those are all empty lists.
        """
        for batch in self._folded.iter_batches(batch_size=few, row_groups=[number], columns=[path], use_threads=False):
            found = [values for column in batch.columns for values in dictionaries(column)]
            if any(len(values.dictionary) for values in found):
                return _longest(found)
        return 0


class _Cursor:
    """A row group being decoded, at row ``position`` of the file."""

    def __init__(self, number: int, first: int, batches: Iterator[pa.RecordBatch]) -> None:
        self.number, self.position = number, first
        self._batches = batches
        self._rest: pa.RecordBatch | None = None

    def read(self, lo: int, hi: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        while self.position < hi:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                return
            first, last = self.position, self.position + batch.num_rows
            self.position = min(last, hi)
            self._rest = batch.slice(hi - first) if hi < last else None
            begin = max(lo, first)
            if begin < self.position:
                yield begin, batch.slice(begin - first, self.position - begin)


def _place(chunk: Any) -> tuple[int, int]:
    """Where in the file a column chunk lies: ``[lo, hi)``."""
    begin = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < begin:
        begin = chunk.dictionary_page_offset
    return begin, begin + max(0, chunk.total_compressed_size)


def unfolded(batch: pa.RecordBatch, n_bytes: int) -> Iterator[pa.RecordBatch]:
    """The batch in pieces that surely fit into ``n_bytes`` where each value of a dictionary is written out."""
    worst = sum(len(values) * _longest([values]) for column in batch.columns for values in dictionaries(column))
    rows = max(1, batch.num_rows * n_bytes // max(1, worst))
    for low in range(0, batch.num_rows, rows):
        yield batch.slice(low, rows)


def _longest(arrays: Iterable[Any]) -> int:
    """Bytes of the longest value that the dictionaries hold."""
    return max((int(pc.max(pc.binary_length(values.dictionary)).as_py() or 0) for values in arrays), default=0)


def dictionaries(column: Any) -> Iterator[Any]:
    """The dictionary arrays of text or bytes at the leaves of a column."""
    if isinstance(column, pa.ExtensionArray):
        yield from dictionaries(column.storage)
    elif isinstance(column, pa.DictionaryArray):
        kind = column.dictionary.type
        if pa.types.is_string(kind) or pa.types.is_binary(kind) or _is_large(kind):
            yield column
    elif isinstance(column, pa.StructArray):
        for at in range(column.type.num_fields):
            yield from dictionaries(column.field(at))
    elif isinstance(column, pa.MapArray):
        yield from dictionaries(column.keys)
        yield from dictionaries(column.items)
    elif isinstance(column, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        yield from dictionaries(column.values)


def _is_large(kind: pa.DataType) -> bool:
    return pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)


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
            arrays.append(nested_arrays.cast(batch.column(at), field.type))
        elif (value := partition.get(field.name)) is not None:
            arrays.append(pa.repeat(pa.scalar(value).cast(field.type), batch.num_rows))
        else:
            arrays.append(pa.nulls(batch.num_rows, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=target)
