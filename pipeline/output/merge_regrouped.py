"""Publishing a job whose shards hold rows in another order: their files are merged back into the input's order.

Each shard's file has its rows in rising order of the input, so that a merge suffices. At most ``FAN_IN`` files are read
side by side; of more, groups are merged into longer files first.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyroaring import BitMap

from pipeline.output import manifest, merge
from pipeline.output.assemble import ranges
from pipeline.output.merge import Rows
from pipeline.output.publish_shard import assemble_partial
from pipeline.process.runtime import Runtime
from storage import failpoints, locations
from storage.errors import CorruptFile, InputChanged, InvalidInput
from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.parquet.arrow_schemas import takeable
from storage.parquet.nested_arrays import cast_batch
from storage.queue import publish_leases
from storage.queue.publish_leases import FinishedShard, LostOutput
from storage.records import Job, PartFile, Shard, Source

FAN_IN = 32
"""Files that are read side by side."""
_RENEW_EVERY = 50
_SMALLEST_BATCH_BYTES = 256 * 2**10


@dataclass(frozen=True, slots=True)
class Merged:
    """``entries``: the manifest's, in row order; ``lost``: shards whose committed files are gone or damaged, by id."""

    entries: list[dict[str, Any]]
    names: set[str]
    lost: dict[str, LostOutput]


@dataclass(frozen=True, slots=True)
class _Run:
    """A file and the rows of the input that it holds, in order."""

    uri: str
    rows: BitMap
    temporary: bool = False


def publish(
    runtime: Runtime,
    job: Job,
    closed_shards: Iterable[FinishedShard],
    *,
    part_rows: int,
    earlier: Mapping[str, Mapping[str, Any]],
    renew: Callable[[], None],
) -> Merged:
    """Write ``data/part-*.parquet`` of ``part_rows`` rows of the input each, as far as shards have finished them.

    ``earlier``: the manifest's entries of what this job had published before, by path. Those files stay unchanged when
    they hold more rows than there are now: the flushed rows may have been collected since. ``renew`` is called before
    each step and raises :class:`LeaseLost` when the steps are another finalizer's. Raises :class:`CorruptFile` for a
    file that went bad after it was checked.
    """
    store = runtime.store
    folder = f"{locations.attempts_dir(job.output_uri, job.id)}merge-{secrets.token_hex(4)}"
    merger = _Merger(runtime, folder, renew)
    lost: dict[str, LostOutput] = {}
    for count, closed in enumerate(closed_shards):
        if count % _RENEW_EVERY == 0:
            renew()
        held = _rows_of(closed.shard, publish_leases.shard_sources(runtime.database, closed.shard))
        if closed.output is not None:
            try:
                merger.add(_checked(store, closed.output, held))
            except CorruptFile as error:
                older = _older(store, closed, held)
                lost[closed.shard.id] = LostOutput(str(error), previous_stands=older is not None)
                if older is not None:
                    merger.add(older)
        elif (run := _unfinished(runtime, job, closed, held)) is not None:
            merger.add(run)
    kept = {f"{job.output_uri.rstrip('/')}/{path}": dict(entry) for path, entry in earlier.items()}
    if merger.n_rows < sum(entry["rows"] for entry in kept.values()) and all(
        store.holds(uri, entry["sha256"]) for uri, entry in kept.items()
    ):
        runtime.notify("the output stays as it was published before: less of it is there to be published now")
        return Merged(list(kept.values()), set(kept), lost)
    entries, names = merger.parts(job.output_uri, job.rows_total, part_rows)
    return Merged(entries, names, lost)


def _rows_of(shard: Shard, sources: Mapping[int, Source]) -> BitMap:
    """The rows of the input that a shard of a regrouped job holds, in its order."""
    (piece,) = shard.slices
    rows = sources[piece.source].rows
    if rows is None:
        raise CorruptFile(f"shard {shard.id} reads no regrouped rows")
    return rows[piece.row_lo : piece.row_lo + piece.row_n]


def _checked(store: ObjectStore, file: PartFile, rows: BitMap) -> _Run:
    store.verify_content(file.uri, file.n_bytes, file.sha256)
    return _Run(file.uri, rows)


def _older(store: ObjectStore, closed: FinishedShard, rows: BitMap) -> _Run | None:
    """What an earlier generation computed, where it is still there."""
    try:
        return None if closed.previous_output is None else _checked(store, closed.previous_output, rows)
    except CorruptFile:
        return None


def _unfinished(runtime: Runtime, job: Job, closed: FinishedShard, rows: BitMap) -> _Run | None:
    """What an unfinished shard has flushed, as one file."""
    if not closed.parts and closed.previous_output is None:
        return None
    number = closed.shard.idx
    try:
        assembled = assemble_partial(runtime, job, closed)
    except (InputChanged, CorruptFile, InvalidInput) as error:
        if (run := _older(runtime.store, closed, rows)) is not None:
            runtime.notify(f"shard {number} stays as it was published before: {error}")
            return run
        runtime.notify(f"shard {number} is left out of the partial output: {error}")
        return None
    there = np.ones(len(rows), dtype=bool)
    for low, high in assembled.missing:
        there[low:high] = False
    held = BitMap(np.array(rows.to_array(), dtype=np.uint32)[there])
    return _Run(assembled.written.uri, held, temporary=True) if held else None


class _Merger:
    """Runs, kept few: as soon as there are ``FAN_IN`` of a level, they become one of the next."""

    def __init__(self, runtime: Runtime, folder: str, renew: Callable[[], None]) -> None:
        self._store, self._settings, self._folder, self._renew = runtime.store, runtime.settings, folder, renew
        self._levels: list[list[_Run]] = []
        self._written = 0

    def add(self, run: _Run, level: int = 0) -> None:
        if level == len(self._levels):
            self._levels.append([])
        if len(self._levels[level]) == FAN_IN:
            # Not before there is one more: what is left at the end is merged at once.
            group, self._levels[level] = self._levels[level], []
            self.add(self._merged(group), level + 1)
        self._levels[level].append(run)

    @property
    def n_rows(self) -> int:
        """Rows that are there to be published."""
        return sum(len(run.rows) for level in self._levels for run in level)

    def parts(self, output: str, rows_total: int, part_rows: int) -> tuple[list[dict[str, Any]], set[str]]:
        """Write the files of the output; returns their entries in the manifest, and their names."""
        runs = [run for level in self._levels for run in level]
        while len(runs) > FAN_IN:
            runs = [*runs[FAN_IN:], self._merged(runs[:FAN_IN])]
        entries, names = [], set()
        everything = BitMap().union(*(run.rows for run in runs)) if runs else BitMap()
        with closing(_Pieces(self._tables(runs))) as pieces:
            for idx, low in enumerate(range(0, rows_total, part_rows)):
                high = min(rows_total, low + part_rows)
                count = everything.range_cardinality(low, high)
                if not count:
                    continue
                self._renew()
                target = locations.part(output, idx)
                entries.append(self._part(target, low, high, count, everything, pieces))
                names.add(target)
                failpoints.hit("finalize.part")
        self._store.delete([run.uri for run in runs if run.temporary])
        return entries, names

    def _part(
        self, target: str, low: int, high: int, count: int, everything: BitMap, pieces: _Pieces
    ) -> dict[str, Any]:
        failed = n_rows = 0
        with parquet.writer(self._store, target, pieces.schema) as file:
            for table in pieces.upto(high):
                failed += table.num_rows - table.column(table.num_columns - 1).null_count
                n_rows += table.num_rows
                file.write(table)
            if n_rows != count:
                raise CorruptFile(f"{count} rows were to be merged into {target}, and {n_rows} were found")
        return manifest.part(
            target,
            n_bytes=file.written.n_bytes,
            sha256=file.written.sha256,
            row_start=low,
            rows=count,
            failed=failed,
            missing=ranges(BitMap(range(low, high)) - everything),
        )

    def _merged(self, runs: Sequence[_Run]) -> _Run:
        """One file of the rows of several."""
        self._renew()
        uri = f"{self._folder}/{self._written:05d}.parquet"
        self._written += 1
        with closing(_Pieces(self._tables(runs))) as pieces, parquet.writer(self._store, uri, pieces.schema) as file:
            for table in pieces.upto(None):
                file.write(table)
        self._store.delete([run.uri for run in runs if run.temporary])
        return _Run(uri, BitMap().union(*(run.rows for run in runs)), temporary=True)

    def _tables(self, runs: Sequence[_Run]) -> Iterator[tuple[Rows, pa.Table]]:
        if not runs:
            return
        share = max(_SMALLEST_BATCH_BYTES, self._settings.read_batch_bytes // len(runs))
        given = parquet.stats(self._store, runs[0].uri).schema
        yield np.empty(0, dtype=np.int64), given.empty_table()
        schema = takeable(given)
        parts = [merge.Run(run.uri, run.rows, self._batches(run, schema, share)) for run in runs]
        for rows, table in merge.merge(parts, schema):
            yield rows, cast_batch(table, given)

    def _batches(self, run: _Run, schema: pa.Schema, n_bytes: int) -> Iterator[tuple[Rows, pa.RecordBatch]]:
        with closing(self._store.open(run.uri)) as reader:
            found, n_rows, batches = parquet.scan(
                reader, run.uri, batch_rows=self._settings.read_batch_rows, batch_bytes=n_bytes
            )
            if n_rows != len(run.rows) or takeable(found).types != schema.types:
                raise CorruptFile(f"{run.uri} does not hold the rows or the columns that it should")
            at = 0
            for batch in batches:
                rows = np.array(run.rows[at : at + batch.num_rows].to_array(), dtype=np.int64)
                yield rows, cast_batch(batch, schema)
                at += batch.num_rows


class _Pieces:
    """A sequence of (rising row numbers, their columns), handed out up to given rows. The first names the columns."""

    def __init__(self, tables: Iterator[tuple[Rows, pa.Table]]) -> None:
        self._tables = tables
        self._rows, self._table = next(tables, (np.empty(0, dtype=np.int64), pa.table({})))
        self.schema = self._table.schema

    def upto(self, end: int | None) -> Iterator[pa.Table]:
        """The next rows, those before row ``end`` of the input; ``None``: all."""
        while True:
            count = len(self._rows) if end is None else int(np.searchsorted(self._rows, end))
            if count:
                yield self._table.slice(0, count)
            if count < len(self._rows):
                self._rows, self._table = self._rows[count:], self._table.slice(count)
                return
            item = next(self._tables, None)
            if item is None:
                self._rows, self._table = self._rows[:0], self._table.slice(0, 0)
                return
            self._rows, self._table = item

    def close(self) -> None:
        close = getattr(self._tables, "close", None)
        if close is not None:
            close()
