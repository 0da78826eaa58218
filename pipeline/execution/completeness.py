"""Exactly one result per row: checked once, here, for every engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pyarrow as pa
from pyroaring import BitMap

from pipeline.engines.base import ResultBatch
from storage.errors import RowmillError


class BrokenEngine(RowmillError):
    """An engine answered a row twice, answered one it was not asked, left one out, or returned ragged columns."""


def only(results: Iterator[ResultBatch], rows: BitMap) -> Iterator[ResultBatch]:
    """The results without those of other rows, which ran because ``rows`` needed them. Closes ``results``, too."""
    with closing(results):  # type: ignore[type-var]
        for batch in results:
            wanted = np.fromiter((int(row) in rows for row in batch.rows), np.bool_, len(batch.rows))
            values = None if batch.values is None else batch.values.filter(pa.array(wanted))
            failures = tuple(failure for failure in batch.failures if failure.row in rows)
            yield replace(batch, rows=batch.rows[wanted], values=values, failures=failures)


class PendingRows:
    """The rows that have no result yet. ``rows`` shrinks as results come."""

    def __init__(self, rows: Iterable[int]) -> None:
        self.rows = BitMap(rows)

    def accept(self, results: ResultBatch) -> tuple[BitMap, BitMap]:
        """The rows of ``results`` are no longer pending; returns (all of them, the failed ones).

        Raises :class:`BrokenEngine`.
        """
        count = len(results.rows)
        if (0 if results.values is None else results.values.num_rows) != count:
            raise BrokenEngine(f"an engine returned {count} row ids with a batch of another length")
        failed = BitMap(failure.row for failure in results.failures)
        rows = BitMap(np.asarray(results.rows, dtype=np.uint32)) | failed
        if len(rows) != count + len(results.failures):
            raise BrokenEngine("an engine answered a row twice in one batch")
        strange = rows - self.rows
        if strange:
            raise BrokenEngine(f"an engine answered row {strange[0]}, which it was not given or had already answered")
        self.rows -= rows
        return rows, failed

    def check_complete(self) -> None:
        """Raise :class:`BrokenEngine` if an answer is missing."""
        if self.rows:
            raise BrokenEngine(f"an engine left {len(self.rows)} rows unanswered, row {self.rows[0]} first")
