"""One ``infer`` call: windows of work are prepared while the sessions compute, results come as they are done.

The caller's thread reads and prepares (tokenizes) the next window between two yields, while the sessions work on the
one before. At most ``AHEAD`` windows are prepared and not yet finished; where windows have few batches, more
of them are, until every lane has two batches. That bounds memory.
"""

from __future__ import annotations

import concurrent.futures
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.engines.base import Cancellation, ResultBatch, RowBatch, RowFailure
from pipeline.engines.onnx.runtime.run import Array, BoundRunner, CancelScope, RunFailed, RunTimedOut, Stopped
from pipeline.engines.onnx.runtime.session_pool import SessionPool
from pipeline.spec.error_codes import MESSAGE_LIMIT, RowErrorCode
from storage.errors import Blame, EngineDead

Indices = npt.NDArray[np.int64]
T = TypeVar("T")

AHEAD = 2
YIELD_ROWS = 512
YIELD_SECONDS = 0.5
"""Finished rows are handed over in batches of this many, or when the oldest has waited this long."""

Batch = Callable[[BoundRunner], ResultBatch]
"""A batch's work on one session."""
Feed = dict[str, Array]
"""Graph input → array."""


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """Prepared work: ``batches`` in the order in which they should run, and the rows that have failed already.

    ``rebatched(budget, n)`` makes batches of every n-th row, at another budget of padded tokens.
    """

    batches: list[Batch]
    failures: tuple[RowFailure, ...] = ()
    rebatched: Callable[[int, int], list[Batch]] | None = None

    def sample(self, budget: int, every: int) -> list[Batch]:
        """Batches that represent all of them, to be measured."""
        return self.batches[::every] if self.rebatched is None else self.rebatched(budget, every)


def sample(windows: Sequence[PreparedRows], budget: int, every: int) -> list[Batch]:
    """Batches that represent those of all windows, to be measured."""
    if len(windows) == 1:
        return windows[0].sample(budget, every)
    return [batch for window in windows for batch in window.batches][::every]


def windows(batches: Iterable[RowBatch], rows: int, max_bytes: int) -> Iterator[tuple[Indices, list[pa.RecordBatch]]]:
    """Regroup row batches into windows of at most ``rows`` rows and about ``max_bytes`` bytes.

    Yields the row indices, int64 [n], and record batches that hold these n rows together.
    """
    ids: list[Indices] = []
    held: list[pa.RecordBatch] = []
    n_rows = n_bytes = 0
    for batch in batches:
        at = 0
        while at < len(batch.rows):
            take = min(rows - n_rows, len(batch.rows) - at)
            part = batch.columns.slice(at, take)
            ids.append(batch.rows[at : at + take])
            held.append(part)
            n_rows, n_bytes, at = n_rows + take, n_bytes + part.nbytes, at + take
            if n_rows >= rows or n_bytes >= max_bytes:
                yield np.concatenate(ids), held
                ids, held, n_rows, n_bytes = [], [], 0, 0
    if n_rows:
        yield np.concatenate(ids), held


def stream(prepared: Iterator[PreparedRows], pool: SessionPool, cancel: Cancellation) -> Iterator[ResultBatch]:
    """Run the windows on the pool. Ends soon after ``cancel``; closing the iterator does the same."""
    scope = CancelScope()
    done: queue.SimpleQueue[Future[ResultBatch] | None] = queue.SimpleQueue()

    def stop() -> None:
        scope.stop()
        done.put(None)

    forget = cancel.on_cancel(stop)
    running: dict[Future[ResultBatch], int] = {}
    unfinished: dict[int, int] = {}
    finished = _Finished()
    number = 0
    more = True
    try:
        while not scope.stopped:
            while (
                more
                and (len(unfinished) < AHEAD or len(running) < 2 * pool.size)
                and not scope.stopped
                and not finished.due(idle=False)
            ):
                window = next(prepared, None)
                if window is None:
                    more = False
                    break
                if window.failures:
                    finished.add(ResultBatch(np.empty(0, np.int64), None, window.failures))
                for batch in window.batches:
                    future = pool.submit(scope, batch)
                    running[future] = number
                    unfinished[number] = unfinished.get(number, 0) + 1
                    future.add_done_callback(done.put)
                number += 1
            if finished.due(idle=not running):
                yield finished.take()
            if not running:
                if more:
                    continue
                break
            try:
                ended = done.get(timeout=finished.patience())
            except queue.Empty:
                continue
            if ended is None:
                break
            of = running.pop(ended)
            unfinished[of] -= 1
            if not unfinished[of]:
                del unfinished[of]
            finished.add(_result(ended))
        if finished.rows:
            yield finished.take()
    finally:
        forget()
        scope.stop()
        settle(running)


def feeds(prepared: Iterable[PreparedRows], pool: SessionPool) -> Iterator[Feed]:
    """What the graph is fed for every batch, in order. The batches are computed: a carried state feeds later rows."""
    for window in prepared:
        for batch in window.batches:
            fed: list[Feed] = []

            def record(run: BoundRunner, batch: Batch = batch, fed: list[Feed] = fed) -> ResultBatch:
                return batch(run.recording(fed))

            pool.submit(CancelScope(), record).result()
            yield from fed


def settle(futures: Iterable[Future[Any]]) -> None:
    """Cancel what has not begun, and wait for what has.

    ``concurrent.futures.wait`` would wait for ever for a future that a closing pool cancelled.
    """
    concurrent.futures.wait([future for future in futures if not future.cancel()])


def _result(future: Future[ResultBatch]) -> ResultBatch:
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise EngineDead("the ONNX Runtime engine was closed while it computed", blame=Blame.OTHERS) from None
    except Stopped:  # by a cancellation whose wake-up is still in the queue
        return ResultBatch(np.empty(0, np.int64), None)


class _Finished:
    """Results waiting to be handed over together."""

    def __init__(self) -> None:
        self._results: list[ResultBatch] = []
        self._since = 0.0
        self.rows = 0

    def add(self, result: ResultBatch) -> None:
        if not len(result.rows) and not result.failures:
            return
        if not self._results:
            self._since = time.monotonic()
        self._results.append(result)
        self.rows += len(result.rows) + len(result.failures)

    def due(self, *, idle: bool) -> bool:
        return self.rows > 0 and (idle or self.rows >= YIELD_ROWS or self.patience() == 0.0)

    def patience(self) -> float | None:
        """Seconds until the oldest result is due; ``None`` when there is none."""
        return max(0.0, self._since + YIELD_SECONDS - time.monotonic()) if self._results else None

    def take(self) -> ResultBatch:
        results, self._results, self.rows = self._results, [], 0
        if len(results) == 1:
            return results[0]
        values = [result.values for result in results if result.values is not None]
        return ResultBatch(
            rows=np.concatenate([result.rows for result in results]),
            values=pa.concat_batches(values) if values else None,  # type: ignore[attr-defined]  # newer than the stubs
            failures=tuple(failure for result in results for failure in result.failures),
        )


def bisect(
    compute: Callable[[Indices], T], items: Indices, still_works: Callable[[], bool]
) -> tuple[list[tuple[Indices, T]], list[tuple[int, str, str]]]:
    """Compute ``items`` together; where the runtime refuses them, in halves, down to the single item that it refuses.

    Returns the parts that worked with their results, and the refused items with the code and the message of their
    error. Halving also helps where a batch takes too much memory or time. Raises
    :class:`~storage.errors.EngineDead` when an item fails alone, for another reason than time, and ``still_works`` says
    that the session does not work for anything any more.
    """
    try:
        return [(items, compute(items))], []
    except RunFailed as error:
        if len(items) > 1:
            middle = len(items) // 2
            left, left_refused = bisect(compute, items[:middle], still_works)
            right, right_refused = bisect(compute, items[middle:], still_works)
            return left + right, left_refused + right_refused
        # A run that took too long does not show that the session is broken.
        if not isinstance(error, RunTimedOut) and not still_works():
            raise EngineDead(f"the ONNX Runtime session stopped working: {error}") from error
        code = RowErrorCode.TIMED_OUT if isinstance(error, RunTimedOut) else RowErrorCode.ENGINE_REFUSED
        return [], [(int(items[0]), code, str(error)[:MESSAGE_LIMIT])]


def record_batch(columns: dict[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    """The columns in the schema's order."""
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
