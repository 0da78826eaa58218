"""Segments: immutable Parquet files of keyed rows, many writers, no coordination.

A segment is written once, under a name of its own, and never changed: an upload that was cut leaves nothing, and two
writers never meet. Its name says when it was made, and how many rows it holds. A row's key is 32 bytes: the first eight
are a column of numbers, small enough to be kept for millions of rows, the others are compared when the row is read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import uuid_utils

from storage.errors import CorruptFile
from storage.locations import normalize, protocol
from storage.objects.store import ObjectStore
from storage.parquet.batches import readable
from storage.parquet.nested_arrays import cast_batch

KEY_BYTES = 32
HASH, CHECK = "_hash", "_check"
"""Columns that a segment has in addition to its values: the key's first eight bytes, and the others."""
GROUP_ROWS = 4096
GROUP_BYTES = 8 * 2**20
"""Row groups end at whichever comes first: one is what is read to get at a row."""
_FOLDER = b"rowmill.folder"
_NAME = re.compile(r"^([0-9a-f]{8}-[0-9a-f]{4})-7[0-9a-f-]{21}-(\d{1,10})\.parquet$")

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Segment:
    """One file. ``made_at``: Unix seconds, by the clock of its writer; ``n_bytes``: compressed."""

    uri: str
    n_rows: int
    n_bytes: int
    made_at: float


def listed(store: ObjectStore, folder: str) -> list[Segment]:
    """The segments below a folder, newest first; other files are none of ours. Empty when there is no such folder."""
    found = []
    for item in store.find(folder, changing=True):  # others delete meanwhile
        match = _NAME.match(item.uri.rpartition("/")[2])
        if match is not None:
            made_at = int(match[1].replace("-", ""), 16) / 1000
            found.append(Segment(item.uri, int(match[2]), item.n_bytes, made_at))
    return sorted(found, key=lambda segment: (segment.made_at, segment.uri), reverse=True)


def write(store: ObjectStore, folder: str, keys: Sequence[bytes], values: pa.Table) -> Segment:
    """Make a segment of n keys, of ``KEY_BYTES`` each, and n rows of values. Raises what the store does."""
    whole = b"".join(keys)
    data = np.frombuffer(whole, np.uint8).reshape(len(keys), KEY_BYTES)
    check = pa.py_buffer(np.ascontiguousarray(data[:, 8:]).tobytes())
    columns: list[Any] = [
        pa.array(hashes(keys)),
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES - 8), len(keys), [None, check]),
    ]
    schema = pa.schema(
        [pa.field(HASH, pa.uint64()), pa.field(CHECK, pa.binary(KEY_BYTES - 8)), *values.schema],
        metadata={_FOLDER: _place(folder)},
    )
    table = pa.Table.from_arrays([*columns, *values.columns], schema=schema)
    name = f"{uuid_utils.uuid7()}-{table.num_rows}.parquet"
    most = max(1, min(GROUP_ROWS, GROUP_BYTES * table.num_rows // max(1, table.nbytes)))
    with (
        store.create(f"{folder}/{name}") as file,
        pq.ParquetWriter(cast(IO[bytes], file), table.schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        writer.write_table(table, row_group_size=most)
    return Segment(file.written.uri, table.num_rows, file.written.n_bytes, time.time())


def delete_abandoned(folder: str, older_than: float) -> None:
    """Delete what writers that were killed have left below a local folder (a store has nothing of it)."""
    if protocol(folder) != "file":
        return
    for path in Path(normalize(folder)).rglob(".*.parquet.*.tmp"):
        with suppress(OSError):
            if path.stat().st_mtime < older_than:
                path.unlink()


def hashes(keys: Sequence[bytes]) -> Hashes:
    """uint64 [n]: what :func:`hashes_of` has of these keys."""
    first = b"".join(key[:8] for key in keys)
    return np.frombuffer(first, ">u8").astype(np.uint64)


def hashes_of(store: ObjectStore, folder: str, segment: Segment) -> Hashes:
    """uint64 [n], by row. Raises :class:`CorruptFile` for what is no segment of this folder."""
    with _opened(store, folder, segment) as file, readable(segment.uri, CorruptFile, "it is damaged"):
        column = file.read([HASH], use_threads=False).column(0)
        found = column.to_numpy().astype(np.uint64, copy=False) if column.type == pa.uint64() else None
    if found is None or column.null_count or len(found) != segment.n_rows:
        raise CorruptFile(f"{segment.uri} is no segment of {segment.n_rows} rows")
    return found


def read(
    store: ObjectStore, folder: str, segment: Segment, rows: npt.NDArray[np.int64], schema: pa.Schema
) -> Iterator[tuple[npt.NDArray[np.int64], list[bytes], pa.Table]]:
    """The rows of those numbers (ascending), at most one row group at a time: which of ``rows``, by position; keys;
    values.

    Only row groups that hold one of them are read, each once; rows that are asked for often come in several portions,
    of about ``GROUP_BYTES``. Raises :class:`CorruptFile`, and what the store does.
    """
    with _opened(store, folder, segment) as file, readable(segment.uri, CorruptFile, "it is damaged"):
        if not file.schema_arrow.remove_metadata().equals(_with_key(schema)):
            raise CorruptFile(f"{segment.uri} holds other columns than those asked for")
        first = 0
        for number in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(number).num_rows
            lo, hi = np.searchsorted(rows, (first, end))
            if lo < hi:
                group = file.read_row_group(number, use_threads=False).combine_chunks()
                for begin, stop in _bounded(group, rows[lo:hi] - first):
                    table = group.take(rows[lo + begin : lo + stop] - first).combine_chunks()
                    starts = np.asarray(table.column(HASH).to_numpy()).astype(">u8").tobytes()
                    ends = table.column(CHECK).to_pylist()
                    keys = [starts[8 * at : 8 * at + 8] + (ends[at] or b"") for at in range(len(ends))]
                    yield np.arange(lo + begin, lo + stop), keys, cast_batch(table.select(schema.names), schema)
            first = end


def _bounded(group: pa.Table, wanted: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Stretches of ``wanted`` (ascending) whose rows take ``GROUP_BYTES`` together, or a single row that is larger.

    A row that is wanted often is copied as often, so the group's size says nothing of it.
    """
    different, times = np.unique(wanted, return_counts=True)
    if len(different) == len(wanted) and group.nbytes <= GROUP_BYTES:
        yield 0, len(wanted)
        return
    sizes = np.repeat([group.slice(int(row), 1).nbytes for row in different], times)
    begin, n_bytes = 0, 0
    for at, size in enumerate(sizes.tolist()):
        if at > begin and n_bytes + size > GROUP_BYTES:
            yield begin, at
            begin, n_bytes = at, 0
        n_bytes += size
    yield begin, len(wanted)


def _with_key(schema: pa.Schema) -> pa.Schema:
    fields: list[Any] = [pa.field(HASH, pa.uint64()), pa.field(CHECK, pa.binary(KEY_BYTES - 8)), *schema]
    return pa.schema(fields)


class _opened:  # noqa: N801 - reads as a function
    """An open segment, known to be of its folder, and closed at the end."""

    def __init__(self, store: ObjectStore, folder: str, segment: Segment) -> None:
        self._store, self._folder, self._segment = store, folder, segment

    def __enter__(self) -> pq.ParquetFile:
        self._file = self._store.open(self._segment.uri)
        try:
            with readable(self._segment.uri, CorruptFile, "it is no readable Parquet file"):
                parquet = pq.ParquetFile(self._file, page_checksum_verification=True)
            self._check(parquet)
        except BaseException:
            self._file.close()
            raise
        return parquet

    def _check(self, parquet: pq.ParquetFile) -> None:
        if (parquet.schema_arrow.metadata or {}).get(_FOLDER) != _place(self._folder):
            raise CorruptFile(f"{self._segment.uri} was written for another folder")

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _place(folder: str) -> bytes:
    """The last two parts of a folder's path: a segment that was moved elsewhere answers for nothing there."""
    return "/".join(folder.rstrip("/").split("/")[-2:]).encode()
