"""The calls that an attempt makes of its engine: rows are read and handed in, results are checked and flushed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
from pyroaring import BitMap

from pipeline.engines.base import Cancellation, Engine, ReadsMany, ResultBatch, RowBatch, RowFailure
from pipeline.execution.attempt_context import AttemptContext
from pipeline.execution.completeness import PendingRows, only
from pipeline.execution.flush import Flusher
from pipeline.execution.prefetch import ReadAhead
from pipeline.planning.sequences import SequenceRows
from pipeline.requests.engine import answering
from pipeline.spec.error_codes import RowErrorCode


class EngineCalls:
    """Belongs to one attempt. Not for several threads."""

    def __init__(self, attempt: AttemptContext, engine: Engine, flusher: Flusher) -> None:
        self._attempt, self._flusher = attempt, flusher
        self._engine = answering(engine, attempt.spec)
        self._pending = PendingRows(attempt.claim.todo)
        sequence = attempt.spec.sequence
        self._sequences = None if sequence is None else SequenceRows(attempt.rows, sequence)

    @property
    def pending(self) -> BitMap:
        """The rows of the claim that have no result yet."""
        return self._pending.rows

    def infer(self, rows: BitMap, cancel: Cancellation, *, isolated: bool = False) -> None:
        """Run ``rows`` on the engine, until ``cancel`` fires. With ``isolated``, the rows inside are noted first."""
        if not rows:
            return
        attempt = self._attempt
        needed = rows if self._sequences is None else self._sequences.with_earlier(rows)
        with closing(self._read(needed)) as batches:
            handed = attempt.steps.handing(attempt.measures.reading(batches), rows, isolated=isolated)
            results = self._engine.infer(attempt.spec, handed, cancel)
            self._accept(results if needed == rows else only(results, rows), rows)

    def quarantine(self, rows: BitMap) -> None:
        """Give ``rows`` an error instead of a result: they kill the engine, and are not run again."""
        self._accept(_poisoned(rows), rows)

    def check_complete(self) -> None:
        """Raise :class:`BrokenEngine` if a row of the claim has no result."""
        self._pending.check_complete()

    def _accept(self, results: Iterator[ResultBatch], asked: BitMap) -> None:
        attempt = self._attempt
        # Closed here and now when a flush fails: what it has inside the engine must not go on.
        with closing(results):  # type: ignore[type-var]
            try:
                for batch in attempt.measures.waiting(results):
                    attempt.measures.add(batch.measured)
                    if not len(batch.rows) and not batch.failures:
                        continue
                    rows, failed = self._pending.accept(batch)
                    self._flusher.add(batch, rows, failed)
                    if not asked & self._pending.rows:
                        # Before the engine goes on: if it dies now, no row was inside.
                        self._flusher.drain_unless_whole()
                    attempt.steps.answered(rows)
            except BaseException:
                if not asked & self._pending.rows:
                    self._flusher.drain()  # the engine broke after its last answer
                raise

    def _read(self, only: BitMap) -> ReadAhead:
        rows, settings = self._attempt.rows, self._attempt.runtime.settings
        if isinstance(self._engine, ReadsMany) and "read_batch_rows" not in settings.model_fields_set:
            rows = replace(rows, batch_rows=self._engine.batch_rows or rows.batch_rows)
        batches = rows.read(self._attempt.plan.columns, only)
        return ReadAhead((RowBatch(ids, columns) for ids, columns in batches), settings.read_ahead_bytes)


def _poisoned(rows: BitMap) -> Iterator[ResultBatch]:
    message = "each time this row was run, the engine or its worker process died"
    failures = tuple(RowFailure(row, RowErrorCode.POISON_ROW, message) for row in rows)
    yield ResultBatch(np.array([], dtype=np.int64), None, failures)
