"""Batches read by a thread of its own, a bounded way ahead of whoever computes on them."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator

from pipeline.engines.base import RowBatch
from storage.logs import thread_with_ids

_ROW_BYTES = 8
"""What a row's index takes: a batch of no columns is not free."""


class ReadAhead(Iterator[RowBatch]):
    """The batches of ``source``, in order, with up to ``limit`` bytes of them waiting (and one batch in any case).

    The source is drawn from, and closed, in the thread; what it raises comes out of ``next``, after the batches before
    it. The thread begins with the first ``next`` and ends with the source, after :meth:`close`, or when nobody holds
    this object any more; a read that is under way then is finished first, and thrown away. ``next`` may be called from
    any thread, one at a time; after ``close``, the batches simply end.
    """

    def __init__(self, source: Iterator[RowBatch], limit: int) -> None:
        self._queue = _Queue(limit)
        self._thread = thread_with_ids("rowmill-read", _fill, self._queue, source)
        self._started = False
        self._end = weakref.finalize(self, self._queue.close)

    def __next__(self) -> RowBatch:
        if not self._started:
            self._started = True
            self._thread.start()
        return self._queue.take()

    def close(self) -> None:
        """End the reading. Safe to call twice, and from any thread."""
        self._end()


class _Queue:
    """Known to both sides; the thread must not hold the reader itself, or it would never be let go of."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._items: deque[tuple[RowBatch, int]] = deque()
        self._bytes = 0
        self._closed = self._ended = False
        self._error: BaseException | None = None

    def put(self, batch: RowBatch) -> bool:
        """Add a batch once there is room; false when nobody wants another."""
        size = batch.columns.nbytes + _ROW_BYTES * len(batch.rows)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._items or self._bytes + size <= self._limit)
            if not self._closed:
                self._items.append((batch, size))
                self._bytes += size
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def take(self) -> RowBatch:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ended or self._items)
            if self._items:
                batch, size = self._items.popleft()
                self._bytes -= size
                self._changed.notify_all()
                return batch
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._bytes, self._error = 0, None
            self._changed.notify_all()


def _fill(queue: _Queue, source: Iterator[RowBatch]) -> None:
    error: BaseException | None = None
    try:
        for batch in source:
            if not queue.put(batch):
                break
            del batch  # it is the queue's now, and counted there
    except BaseException as problem:
        # Not swallowed: the consumer raises it.
        error = problem
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            close()
        queue.end(error)
