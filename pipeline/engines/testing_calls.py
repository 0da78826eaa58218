"""How the contract suite calls an engine: batches that are watched while they are drawn, and results by row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pipeline.engines.base import Cancellation, Engine, ResultBatch, RowBatch
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec

MakeBatch = Callable[[int, int], RowBatch]
"""``(first, n)`` → a batch with the rows ``first`` … ``first + n - 1``; no two rows have the same content."""


class Source:
    """Batches that count how often they are asked for, and by how many threads at once."""

    def __init__(self, batches: Iterable[RowBatch], on_draw: Callable[[int], None] = lambda n: None) -> None:
        self._batches = iter(batches)
        self._on_draw = on_draw
        self._busy = threading.Lock()
        self.drawn_rows = 0
        self.drawn = 0
        self.overlapped = False

    def __iter__(self) -> Iterator[RowBatch]:
        return self

    def __next__(self) -> RowBatch:
        if not self._busy.acquire(blocking=False):
            self.overlapped = True
            raise AssertionError("batches was drawn by two threads at the same time")
        try:
            batch = next(self._batches)
            self.drawn += 1
            self.drawn_rows += len(batch.rows)
            self._on_draw(self.drawn)
            return batch
        finally:
            self._busy.release()


def cancel_when(signal: threading.Event, cancel: Cancellation) -> threading.Thread:
    """A started thread that cancels once the signal is set."""

    def wait_and_cancel() -> None:
        signal.wait()
        cancel.cancel("test")

    thread = threading.Thread(target=wait_and_cancel)
    thread.start()
    return thread


def stream(make_batch: MakeBatch, n: int, batch_rows: int) -> Iterator[RowBatch]:
    """``n`` rows in batches, made as they are drawn."""
    for first in range(0, n, batch_rows):
        yield make_batch(first, min(batch_rows, n - first))


def split(make_batch: MakeBatch, n: int, batch_rows: int) -> Sequence[RowBatch]:
    return list(stream(make_batch, n, batch_rows))


def results(engine: Engine, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation | None = None) -> Any:
    """The call's iterator, which has ``close``."""
    return engine.infer(spec, batches, Cancellation() if cancel is None else cancel)


def run(
    engine: Engine, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation | None = None
) -> dict[int, Any]:
    """Row → its result as a dict of Python values, or its failure."""
    return collect(results(engine, spec, batches, cancel))


def collect(found: Iterable[ResultBatch]) -> dict[int, Any]:
    """Row → result or failure. Fails when a row was answered twice."""
    answered: dict[int, Any] = {}
    for result in found:
        values = [] if result.values is None else result.values.to_pylist()
        assert len(values) == len(result.rows)
        for row, answer in zip(result.rows.tolist(), values, strict=True):
            assert row not in answered, f"row {row} was answered twice"
            answered[row] = answer
        for failure in result.failures:
            assert failure.row not in answered, f"row {failure.row} was answered twice"
            assert failure.code in set(RowErrorCode)
            assert failure.message
            answered[failure.row] = failure
    return answered


def count(result: ResultBatch) -> int:
    return len(result.rows) + len(result.failures)
