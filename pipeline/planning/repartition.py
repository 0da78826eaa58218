"""``order="prefix"`` across shards: the rows of a job are copied to Parquet chunks of prompts that begin alike.

Two passes over the input: one samples what prompts begin with and decides where to cut (``range_partition``), one puts
each row into its partition. A chunk's rows keep the input's order, so that the output can be merged back into it
(``output.merge_regrouped``); the chunk, as a source of the job, notes which rows it holds. The names of the chunks say
what is in them: a rerun, or a second planner, writes the same files, or others next to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyroaring import BitMap

from pipeline.inputs import row_groups
from pipeline.inputs.discovery import Inputs
from pipeline.inputs.disk_list import DiskBackedList
from pipeline.inputs.input_rows import InputRows
from pipeline.planning import shard_plan
from pipeline.planning.spill import PartitionedSpill
from pipeline.prefix import range_partition
from pipeline.prefix.keys import KEY_BYTES, key_columns, keys
from pipeline.spec.job_spec import JobSpec
from storage import failpoints, locations
from storage.errors import InvalidInput
from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.records import ShardPlan, Source

MOST_ROWS = 2**32
"""Row numbers are kept in 32-bit bitmaps."""
_WINDOW = 2**20
"""Rows that are looked up at a time when chunks are made again."""
_VERSION = 1
"""Raised when other chunks would be made of the same input."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``partition_rows``: most rows in a shard, as many as an engine puts in order at a time. ``n_bytes``: of rows in
    memory (about three times that at the most). The rest as in the settings."""

    partition_rows: int
    n_bytes: int
    batch_rows: int
    batch_bytes: int


@dataclass(frozen=True, slots=True)
class Repartitioned:
    """``chunks`` follow the job's own sources in number; ``shards`` are made over them, and none over two of them.

    ``part_rows``: how many rows a file of the output gets.
    """

    chunks: DiskBackedList[Source]
    shards: DiskBackedList[ShardPlan]
    part_rows: int


@dataclass(frozen=True, slots=True)
class JobRows:
    """The rows of a job that are copied, and the ``columns`` of them.

    ``going_on`` is called often while they are read, and ends the work by raising.
    """

    store: ObjectStore
    found: Inputs
    columns: Sequence[str]
    limits: Limits
    going_on: Callable[[], object]

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([self.found.schema.field(name) for name in self.columns])

    def read(self, names: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
        """All rows of the job with these columns: (their numbers in the job, the columns)."""
        first = 0
        for file in self.found.files:
            source, limits = self.found.sources[file.source], self.limits
            copied = InputRows(
                self.store,
                {source.idx: source},
                file.slices(),
                self.found.schema,
                limits.batch_rows,
                limits.batch_bytes,
            )
            for rows, batch in copied.read(names):
                self.going_on()
                yield rows + first, batch
            first += file.rows


def wanted(spec: JobSpec, n_rows: int, limits: Limits) -> bool:
    """Whether the job's rows are to be copied: asked for, and more than what an engine puts in order by itself.

    Raises :class:`InvalidInput` for more rows than can be numbered.
    """
    if spec.order != "prefix" or not key_columns(spec) or n_rows <= min(spec.shard_rows, limits.partition_rows):
        return False
    if n_rows > MOST_ROWS:
        raise InvalidInput(
            f"the input has {n_rows:,} rows, and order 'prefix' regroups at most {MOST_ROWS:,}; split the input, or "
            "use order 'auto'",
            field="order",
        )
    return True


def repartition(rows: JobRows, spec: JobSpec, work_dir_uri: str) -> Repartitioned:
    """Copy ``rows`` to chunks below ``work_dir_uri``.

    Raises :class:`InputChanged` when a file is not the one that was found, and :class:`InvalidInput` when it is
    damaged.
    """
    store, found, limits = rows.store, rows.found, rows.limits
    n_rows = found.rows
    n_bytes = sum(size for file in found.files for _, size in file.row_groups)
    by_bytes = max(1, spec.shard_bytes * n_rows // max(1, n_bytes))
    most = min(spec.shard_rows, limits.partition_rows, by_bytes)

    sample = range_partition.Sample(limits.n_bytes)
    for _, batch in rows.read(key_columns(spec)):
        sample.add(keys(batch))
    cuts = range_partition.separators(sample.sorted(), range_partition.FILL * most / n_rows)
    failpoints.hit("plan.sampled")

    names = list(dict.fromkeys([*rows.columns, *key_columns(spec)]))
    schema = rows.schema
    with PartitionedSpill(schema, len(cuts) + 1, limits.n_bytes) as spill:
        for numbers, batch in rows.read(names):
            partitions = np.array(
                range_partition.partition_of(keys(batch.select(list(key_columns(spec)))), cuts), dtype=np.int64
            )
            spill.put(numbers, partitions, batch.select(list(rows.columns)))
        failpoints.hit("plan.spilled")
        key = _key(found, spec, rows.columns, cuts)
        chunks: DiskBackedList[Source] = DiskBackedList()
        shards: DiskBackedList[ShardPlan] = DiskBackedList()
        row_start = 0
        for partition in range(len(cuts) + 1):
            rows.going_on()
            uri = locations.prefix_chunk(work_dir_uri, len(chunks), key)
            held = _write(store, uri, schema, spill.take(partition))
            if held is None:
                continue
            failpoints.hit("plan.chunk")
            info = store.info(uri)
            if (there := parquet.stats(store, uri).n_rows) != len(held):
                raise InvalidInput(f"{uri} has {there:,} rows, and {len(held):,} belong there; submit the job again")
            source = Source(len(found.sources) + len(chunks), uri, info.etag, info.n_bytes, len(held), rows=held)
            chunks.append(source)
            for plan in _shards(store, source, most, spec.shard_bytes, len(shards), row_start):
                shards.append(plan)
            row_start += len(held)
    if row_start != n_rows:
        raise InvalidInput(f"{n_rows} rows were found and {row_start} were read; submit the job again", field="input")
    return Repartitioned(chunks, shards, min(spec.shard_rows, by_bytes))


def rewrite_chunks(rows: JobRows, chunks: Sequence[Source]) -> None:
    """Write ``chunks`` again: each with the rows that it held, whatever would be chosen to lie together today.

    Errors as in :func:`repartition`.
    """
    with PartitionedSpill(rows.schema, len(chunks), rows.limits.n_bytes) as spill:
        partitions = _Partitions([chunk.rows or BitMap() for chunk in chunks])
        for numbers, batch in rows.read(rows.columns):
            of = partitions.of(numbers)
            mine = of >= 0
            spill.put(numbers[mine], of[mine], batch.filter(pa.array(mine)))
        for partition, chunk in enumerate(chunks):
            rows.going_on()
            _write(rows.store, chunk.uri, rows.schema, spill.take(partition))


class _Partitions:
    """Which of some sets of rows each row belongs to, looked up a window of neighbouring rows at a time."""

    def __init__(self, partitions: Sequence[BitMap]) -> None:
        self._partitions = partitions
        self._first = 0
        self._window = np.empty(0, dtype=np.int64)

    def of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The number of each row's partition, -1 for none. ``rows`` follow each other, and those asked before."""
        found = []
        while len(rows):
            if not 0 <= rows[0] - self._first < len(self._window):
                self._look(int(rows[0]))
            inside = rows[rows < self._first + len(self._window)]
            found.append(self._window[inside - self._first])
            rows = rows[len(inside) :]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _look(self, first: int) -> None:
        self._first, self._window = first, np.full(_WINDOW, -1, dtype=np.int64)
        here = BitMap(range(first, min(first + _WINDOW, MOST_ROWS)))
        for number, partition in enumerate(self._partitions):
            self._window[np.array((partition & here).to_array(), dtype=np.int64) - first] = number


def _key(found: Inputs, spec: JobSpec, columns: Sequence[str], cuts: Sequence[bytes]) -> str:
    """Tells apart chunks that hold other rows: made of other files, or cut elsewhere."""
    some = () if spec.limit is None and spec.sample is None else ((spec.limit, spec.sample),)
    made_of = (_VERSION, KEY_BYTES, key_columns(spec), tuple(columns), *some, *cuts)
    digest = hashlib.sha256(repr(made_of).encode())
    for source in found.sources:
        digest.update(f"\0{source.uri}\0{source.etag}".encode())
    return digest.hexdigest()[:12]


def _write(
    store: ObjectStore, uri: str, schema: pa.Schema, partition: Iterator[tuple[npt.NDArray[np.int64], pa.Table]]
) -> BitMap | None:
    """The rows that were written, or ``None``, and no file, when the partition is empty."""
    held = BitMap()
    first = next(partition, None)
    if first is None:
        return None
    with parquet.writer(store, uri, schema, keep_existing=True) as file:
        for rows, table in (first, *partition):
            held |= BitMap(rows.astype(np.uint32))
            file.write(table)
    return held


def _shards(
    store: ObjectStore, source: Source, most: int, shard_bytes: int, idx: int, row_start: int
) -> Iterator[ShardPlan]:
    """Shards over one chunk, about equal; usually one. Each is a stretch of it, so that its rows keep their order."""
    groups = parquet.stats(store, source.uri).row_groups
    share = -(-source.n_rows // -(-source.n_rows // most))
    for plan in shard_plan.plan([row_groups.InputFile(source.idx, groups)], shard_rows=share, shard_bytes=shard_bytes):
        yield ShardPlan(idx + plan.idx, row_start + plan.row_start, plan.row_n, plan.n_bytes, plan.slices)
