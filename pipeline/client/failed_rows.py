"""Every failed row of a job with its reason: from the published output once there is one, from flushed files before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyroaring import BitMap

from pipeline.boundary import boundary
from pipeline.jobs.status_query import request_status
from pipeline.output import manifest
from pipeline.output.assemble import ERROR_FIELD, ROW_COLUMN
from pipeline.output.destination import published
from pipeline.process.runtime import Runtime
from pipeline.spec.status import RequestStatus
from storage import locations
from storage.errors import CorruptFile
from storage.fleet import failures
from storage.parquet import parquet
from storage.queue import jobs, regrouped_rows
from storage.records import OUTPUT_SEQ, Job, PartFile, RowException, Shard
from storage.states import TERMINAL_JOB, RequestState

Rows = npt.NDArray[np.int64]
Reasons = Mapping[int, tuple[str, str]]

_AT_ONCE = 10_000
"""Failed rows of a regrouped job whose reasons are looked up together."""
UNKNOWN = ("unknown", "why it failed is not kept any more: its files have been deleted or replaced")


class _Moved(Exception):
    """The job has ended, or was retried, while its files were read: they lie elsewhere now."""


@boundary
class FailedRows(Sequence[RowException]):
    """Failed rows in input order, read on demand. Each iteration looks at the job anew.

    ``len()`` counts them without reading them all. ``total`` counts all failed rows of the job, whatever ``after`` and
    ``limit`` leave out. A row that is being computed once more (after a retry) has not failed.
    """

    def __init__(
        self, runtime: Callable[[], Runtime], job_id: str, after: int | None = None, limit: int | None = None
    ) -> None:
        self._open, self._job_id, self._limit = runtime, job_id, limit
        self._after = -1 if after is None else after

    def __repr__(self) -> str:
        return f"FailedRows({self._job_id!r}, after={self._after}, limit={self._limit})"

    @property
    def total(self) -> int:
        """How many rows of the job have failed."""
        return self._count(-1)

    def __len__(self) -> int:
        count = self._count(self._after)
        return count if self._limit is None else min(count, self._limit)

    def __iter__(self) -> Iterator[RowException]:
        return _Guarded(islice(self._rows(self._after), self._limit))

    @overload
    def __getitem__(self, index: int) -> RowException: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowException]: ...
    def __getitem__(self, index: int | slice) -> RowException | list[RowException]:
        if isinstance(index, slice):
            return list(self)[index]
        at = index if index >= 0 else len(self) + index
        if at >= 0:
            for item in islice(self, at, at + 1):
                return item
        raise IndexError(f"there are {len(self)} failed rows, and none is number {index}")

    def __reversed__(self) -> Iterator[RowException]:
        return reversed(list(self))

    def _count(self, after: int) -> int:
        runtime = self._open()
        job = jobs.get(runtime.database, self._job_id)
        entries = _published_entries(runtime, job)
        if entries is None:
            return sum(int((rows > after).sum()) for _, _, rows in _failing(runtime, job))
        count = 0
        for entry in entries:
            if entry["row_start"] > after:
                count += entry["rows_failed"]
            elif _end(entry) > after + 1 and entry["rows_failed"]:
                count += sum(1 for _ in _of_file(runtime, job, entry, after))
        return count

    def _rows(self, after: int) -> Iterator[RowException]:
        while True:
            runtime = self._open()
            job = jobs.get(runtime.database, self._job_id)
            entries = _published_entries(runtime, job)
            found = _of_shards(runtime, job, after) if entries is None else _of_output(runtime, job, entries, after)
            try:
                for item in found:
                    yield item
                    after = item.row
            except _Moved:
                continue
            except CorruptFile:
                if not _has_moved(runtime, job):
                    raise
            else:
                return


@boundary
class _Guarded(Iterator[RowException]):
    def __init__(self, rows: Iterator[RowException]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[RowException]:
        return self

    def __next__(self) -> RowException:
        return next(self._rows)


def row_status(runtime: Runtime, job: Job, row: int) -> RequestStatus:
    """One row of the job, with the reason if it has failed. Raises :class:`~storage.errors.NotFound` beyond the end."""
    status = request_status(runtime.database, job, row)
    if status.state is not RequestState.FAILED or status.code is not None:
        return status
    found = next(iter(FailedRows(lambda: runtime, job.id, after=row - 1, limit=1)), None)
    if found is None or found.row != row:
        return status
    return replace(status, code=found.code, message=found.message)


def _has_moved(runtime: Runtime, job: Job) -> bool:
    now = jobs.get(runtime.database, job.id)
    return (now.state, now.gen) != (job.state, job.gen)


def _published_entries(runtime: Runtime, job: Job) -> list[Mapping[str, Any]] | None:
    """The manifest's entries of what this job has published, in row order; ``None`` while it has not."""
    uri = locations.manifest(job.output_uri)
    if job.state not in TERMINAL_JOB or not runtime.store.exists(uri):
        return None
    try:
        document = json.loads(runtime.store.read_bytes(uri))
        if document["job"]["id"] != job.id:
            return None
        return sorted(document["parts"], key=lambda entry: int(entry["row_start"]))
    except (ValueError, KeyError, TypeError):
        return None


def _end(entry: Mapping[str, Any]) -> int:
    return int(entry["row_start"]) + int(entry["rows"]) + len(manifest.missing_rows(entry))


def _of_output(runtime: Runtime, job: Job, entries: Sequence[Mapping[str, Any]], after: int) -> Iterator[RowException]:
    for entry in entries:
        if entry["rows_failed"] and _end(entry) > after + 1:
            yield from _of_file(runtime, job, entry, after)


def _of_file(runtime: Runtime, job: Job, entry: Mapping[str, Any], after: int) -> Iterator[RowException]:
    first = int(entry["row_start"])
    rows = np.arange(first, _end(entry))
    if missing := manifest.missing_rows(entry):
        rows = np.delete(rows, np.array(missing.to_array(), dtype=np.int64))
    at = 0
    for batch in parquet.columns(runtime.store, f"{job.output_uri.rstrip('/')}/{entry['path']}", [ERROR_FIELD.name]):
        for row, code, message in _errors(batch, rows[at : at + batch.num_rows]):
            if row > after:
                yield RowException(row, code, message)
        at += batch.num_rows


def _errors(batch: pa.RecordBatch, rows: Rows) -> Iterator[tuple[int, str, str]]:
    """The rows of a batch whose error is not null; ``rows`` are their numbers, int64 [n]."""
    errors: Any = batch.column(batch.schema.get_field_index(ERROR_FIELD.name))
    bad = np.flatnonzero(errors.is_valid().to_numpy(zero_copy_only=False))
    for row, error in zip(rows[bad].tolist(), errors.take(pa.array(bad)).to_pylist(), strict=True):
        yield row, error["code"], error["message"]


def _failing(runtime: Runtime, job: Job) -> Iterator[tuple[list[Shard], BitMap, Rows]]:
    """Each shard with failed rows, in all its generations; which rows of it these are; and which of the job, sorted."""
    for group in failures.failing(runtime.database, job.id):
        newest = group[-1]
        local = np.array(newest.failed.to_array(), dtype=np.int64)
        held = regrouped_rows.of_shard(runtime.database, newest)
        rows = newest.row_start + local if held is None else np.array(held.to_array(), dtype=np.int64)[local]
        yield group, newest.failed, rows


def _of_shards(runtime: Runtime, job: Job, after: int) -> Iterator[RowException]:
    if not job.plan.get("part_rows"):
        for group, failed, rows in _failing(runtime, job):
            wanted = rows > after
            if wanted.any():
                yield from _explained(runtime, job, group, failed, rows, wanted)
        return
    # The rows of a regrouped job's shards lie between each other.
    groups = list(_failing(runtime, job))
    all_rows = BitMap().union(*(BitMap(rows.astype(np.uint32)) for _, _, rows in groups)) if groups else BitMap()
    ordered = np.array(all_rows.to_array(), dtype=np.int64)
    ordered = ordered[ordered > after]
    for at in range(0, len(ordered), _AT_ONCE):
        low, high = ordered[at], ordered[min(at + _AT_ONCE, len(ordered)) - 1]
        found: list[RowException] = []
        for group, failed, rows in groups:
            wanted = (rows >= low) & (rows <= high)
            if wanted.any():
                found += _explained(runtime, job, group, failed, rows, wanted)
        yield from sorted(found, key=lambda item: item.row)


def _explained(
    runtime: Runtime, job: Job, group: Sequence[Shard], failed: BitMap, rows: Rows, wanted: npt.NDArray[np.bool_]
) -> Iterator[RowException]:
    local = np.array(failed.to_array(), dtype=np.int64)
    reasons = _reasons(runtime, job, group, BitMap(local[wanted].astype(np.uint32)))
    if len(reasons) < int(wanted.sum()) and _has_moved(runtime, job):
        raise _Moved
    for row, index in zip(rows[wanted].tolist(), local[wanted].tolist(), strict=True):
        yield RowException(row, *reasons.get(index, UNKNOWN))


def _reasons(runtime: Runtime, job: Job, group: Sequence[Shard], wanted: BitMap) -> Reasons:
    """Row index in the shard → code and message, as far as they can be found; the newest generation's word counts."""
    found: dict[int, tuple[str, str]] = {}
    for shard in reversed(group):
        left = (wanted & shard.failed) - BitMap(found)
        if not left:
            continue
        known = failures.exceptions(runtime.database, shard.id)
        found |= {row: known[row] for row in left if row in known}
        for file in failures.files(runtime.database, shard.id):
            left -= BitMap(found)
            if left & file.failed:
                found |= {row: why for row, why in _of_part(runtime, job, shard, file) if row in left}
    return found


def _of_part(runtime: Runtime, job: Job, shard: Shard, file: PartFile) -> Iterator[tuple[int, tuple[str, str]]]:
    store, assembled = runtime.store, file.seq == OUTPUT_SEQ
    if not store.exists(file.uri):
        elsewhere = published(store, job.output_uri, shard.idx, file)
        if not assembled or job.plan.get("part_rows") or elsewhere is None:
            return
        if not store.holds(elsewhere.uri, file.sha256):
            return
        file = replace(file, uri=elsewhere.uri)
    rows = np.array(file.rows.to_array(), dtype=np.int64)
    at = 0
    for batch in parquet.columns(store, file.uri, [ERROR_FIELD.name] + ([] if assembled else [ROW_COLUMN])):
        for row, code, message in _errors(batch, rows[at : at + batch.num_rows]):
            yield row, (code, message)
        at += batch.num_rows
