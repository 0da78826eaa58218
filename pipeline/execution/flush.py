"""Gathers an attempt's results and makes them durable: each flush is a verified part file and a fenced resume point.

Writing happens in a thread of its own, so that the engine goes on meanwhile. One file holds ``flush_rows``/2 rows, and
at most two buffers exist (one fills while the other is written), so a crash costs at most ``flush_rows`` rows, and what
the engine's last batches hold beyond that.

Rows that come fast are cheap to compute again, and a resume point costs as much as thousands of them. So unless the
operator has set ``flush_rows``, a crash may cost the rows of ``CHEAP_SECONDS``, and each file holds what came in half
of that time. A shard that is done within ``CHEAP_SECONDS`` needs no file: its output is written from memory, and its
commit is its only transaction.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
from pyroaring import BitMap

from pipeline.engines.base import ResultBatch
from pipeline.execution.attempt_context import AttemptContext
from pipeline.output import assemble, owner
from pipeline.spec.error_codes import RowErrorCode
from storage import failpoints
from storage.logs import pool_with_ids
from storage.parquet import parquet
from storage.queue import attempts, job_progress
from storage.records import Computed, PartFile, RowException
from storage.sql.retry import retry_write
from storage.sql.tables import TOKENS

CHEAP_SECONDS = 5.0
"""Rows that took no longer than this need no resume point, unless the operator has set ``flush_rows``."""
_FAILURE_BYTES = 512
"""About what a failed row takes in memory."""


@dataclass(frozen=True, slots=True)
class Whole:
    """All results of a shard, in order: ``results`` in the layout of a part file, and what there is to count."""

    results: pa.Table
    counts: Computed


class Flusher:
    """One attempt's part files. Use as a context manager; ``add`` results, then ``drain``.

    ``parts`` are the files flushed so far, oldest first. Errors of the writing thread surface at the next call.
    """

    def __init__(self, attempt: AttemptContext, schema: pa.Schema) -> None:
        self._attempt, self._schema = attempt, schema
        self._unflushed, self._shard_id = attempt.runtime.unflushed, attempt.claim.shard.id
        self._pool = pool_with_ids(1, "rowmill-flush")
        self._pool.submit(int)  # starts its thread: an interpreter that is ending starts none, and has yet to flush
        settings = attempt.runtime.settings
        self._seconds = settings.flush_seconds
        if attempt.spec.request_column is not None:  # somebody may be following a batch
            self._seconds = min(self._seconds, settings.batch_flush_seconds)
        self._pending: Future[PartFile] | None = None
        self._seq = 0
        self._exact = "flush_rows" in attempt.runtime.settings.model_fields_set
        self._clear()
        self.parts: list[PartFile] = []

    def __enter__(self) -> Flusher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        self._unflushed.pop(self._shard_id, None)

    def add(self, results: ResultBatch, rows: BitMap, failed: BitMap) -> None:
        """Take results whose rows are settled; flushes when rows, bytes or seconds say so."""
        self._buffer.append(results)
        self._rows |= rows
        self._failed |= failed
        self._bytes += 0 if results.values is None else results.values.nbytes
        self._bytes += _FAILURE_BYTES * len(results.failures)
        self._unflushed[self._shard_id] = len(self._rows)
        settings, seconds = self._attempt.runtime.settings, time.monotonic() - self._since
        many = 2 * len(self._rows) >= settings.flush_rows and (self._exact or 2 * seconds >= CHEAP_SECONDS)
        if many or self._bytes >= settings.flush_bytes or seconds >= self._seconds:
            self._begin()

    def drain(self) -> None:
        """Flush what is left and wait until all of it is durable."""
        if self._buffer:
            self._begin()
        self._settle()

    def drain_unless_whole(self) -> None:
        """Like :meth:`drain`, but a shard that is whole in memory is left there, for :meth:`take_whole`."""
        if not self._is_whole():
            self.drain()

    def take_whole(self) -> Whole | None:
        """The results of all rows of the shard, where none was flushed; then none needs to be. Otherwise ``None``."""
        if not self._is_whole():
            return None
        buffer = self._buffer
        self._clear()
        return Whole(
            assemble.result_table(self._schema, buffer),
            Computed(count_tokens(batch.values for batch in buffer), _exceptions(buffer)),
        )

    def _is_whole(self) -> bool:
        """Whether all of the shard is here, and cheap: what a crash before the commit would cost.

        Only of a first attempt: one that follows a failure makes progress by resume points, whatever it dies of. Nor
        where ``flush_rows`` is set: then a shard's rows are flushed before its engine goes on.
        """
        claim = self._attempt.claim
        afresh = (
            claim.attempt_no == 1 and claim.previous_output is None and claim.shard.select is None and not self._exact
        )
        whole = afresh and self._seq == 0 and len(self._rows) == claim.shard.row_n > 0
        return whole and time.monotonic() - self._since < min(CHEAP_SECONDS, self._seconds)

    def _clear(self) -> None:
        self._buffer: list[ResultBatch] = []
        self._rows, self._failed, self._bytes = BitMap(), BitMap(), 0
        self._since = time.monotonic()

    def _begin(self) -> None:
        self._settle()
        self._pending = self._pool.submit(self._flush, self._seq, self._buffer, self._rows, self._failed)
        self._seq += 1
        self._clear()

    def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                part = pending.result()
            finally:
                del pending  # its error holds this frame: a ring that would keep the caller's engine call open
            self.parts.append(part)

    def _flush(self, seq: int, buffer: list[ResultBatch], rows: BitMap, failed: BitMap) -> PartFile:
        began = time.monotonic()
        runtime, claim = self._attempt.runtime, self._attempt.claim
        owner.check(runtime, claim.job)
        table = assemble.result_table(self._schema, buffer)
        with parquet.writer(runtime.store, f"{self._attempt.directory}/part-{seq:05d}.parquet", table.schema) as file:
            file.write(table)
        written = file.written
        runtime.store.verify(written)
        failpoints.hit("flush.stored")
        part = PartFile(
            attempt_no=claim.attempt_no,
            seq=seq,
            uri=written.uri,
            n_bytes=written.n_bytes,
            sha256=written.sha256,
            etag=written.etag,
            rows=rows,
            failed=failed,
        )
        exceptions = _exceptions(buffer)
        tokens = count_tokens(batch.values for batch in buffer)
        poison = sum(exception.code == RowErrorCode.POISON_ROW for exception in exceptions)
        self._attempt.record(attempts.flush, part, tokens=tokens, exceptions=exceptions, n_poison=poison)
        self._attempt.measures.flushed(len(rows), time.monotonic() - began)
        failpoints.hit("flush.recorded")
        if failed and claim.job.spec.get("max_failed_rows") is not None:
            retry_write(lambda: job_progress.stop_if_too_many_failed(runtime.database, claim.job.id, runtime.actor))
        return part


def _exceptions(buffer: list[ResultBatch]) -> tuple[RowException, ...]:
    return tuple(
        RowException(failure.row, str(failure.code), failure.message) for batch in buffer for failure in batch.failures
    )


def count_tokens(batches: Iterable[pa.RecordBatch | None]) -> dict[str, int]:
    """The sums of those of the token columns that the results have."""
    counts: dict[str, int] = {}
    for batch in batches:
        for name in TOKENS:
            index = -1 if batch is None else batch.schema.get_field_index(name)
            if batch is not None and index >= 0:
                counts[name] = counts.get(name, 0) + int(pc.sum(batch.column(index)).as_py() or 0)
    return counts
