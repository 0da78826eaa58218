"""Reading ahead: in order, bounded, errors and ends where they belong, and no thread left behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines.base import RowBatch
from pipeline.execution.prefetch import ReadAhead

WAIT = 60.0


def batch(number: int, n_bytes: int = 92) -> RowBatch:
    """100 bytes as they are counted, unless told otherwise."""
    column = pa.array([b"x" * n_bytes], pa.binary(n_bytes))
    return RowBatch(np.array([number], dtype=np.int64), pa.record_batch([column], names=["a"]))


class Source:
    """Counts what was drawn; ``closed`` is set when its thread is done with it."""

    def __init__(self, batches: int, *, fails: bool = False) -> None:
        self.drawn = 0
        self.closed = threading.Event()
        self.drew = threading.Condition()
        self._batches, self._fails = batches, fails
        self.thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[RowBatch]:
        self.thread = threading.current_thread()
        try:
            for number in range(self._batches):
                with self.drew:
                    self.drawn += 1
                    self.drew.notify_all()
                yield batch(number)
            if self._fails:
                raise OSError("the store is gone")
        finally:
            self.closed.set()

    def wait_for(self, drawn: int) -> None:
        with self.drew:
            assert self.drew.wait_for(lambda: self.drawn >= drawn, WAIT)

    def ended(self) -> bool:
        assert self.closed.wait(WAIT)
        assert self.thread is not None
        self.thread.join(WAIT)
        return not self.thread.is_alive()


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), max_size=30), st.integers(0, 1000))
def test_what_goes_in_comes_out_in_order(sizes: list[int], limit: int) -> None:
    batches = [batch(number, size) for number, size in enumerate(sizes)]
    assert list(ReadAhead(iter(batches), limit)) == batches


def test_it_reads_ahead_up_to_the_limit_and_no_further() -> None:
    source = Source(100)
    ahead = ReadAhead(iter(source), 300)
    assert source.drawn == 0, "nothing is read before somebody asks"
    assert next(ahead).rows.tolist() == [0]
    source.wait_for(5)  # three wait, the fifth has no room
    assert source.drawn == 5
    assert next(ahead).rows.tolist() == [1]
    source.wait_for(6)
    assert source.drawn == 6
    ahead.close()
    assert source.ended()
    assert list(ahead) == []


def test_without_a_limit_to_speak_of_one_batch_waits() -> None:
    source = Source(3)
    ahead = ReadAhead(iter(source), 0)
    assert [item.rows.tolist() for item in ahead] == [[0], [1], [2]]
    assert source.ended()


def test_an_error_comes_after_what_was_read_before_it() -> None:
    source = Source(2, fails=True)
    ahead = ReadAhead(iter(source), 10_000)
    assert [next(ahead).rows.tolist() for _ in range(2)] == [[0], [1]]
    with pytest.raises(OSError, match="the store is gone"):
        next(ahead)
    assert list(ahead) == []
    assert source.ended()


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_the_thread_ends_with_its_consumer(how: str) -> None:
    source = Source(100)
    ahead = ReadAhead(iter(source), 100)
    next(ahead)
    if how == "closed":
        ahead.close()
        ahead.close()
    else:
        del ahead
        gc.collect()
    assert source.ended()


def test_closing_lets_go_of_a_waiting_consumer() -> None:
    """The engine's feeder waits in another thread, while a read hangs; the shard is cancelled."""
    reading, release = threading.Event(), threading.Event()

    def hanging() -> Iterator[RowBatch]:
        reading.set()
        release.wait(WAIT)
        yield batch(0)

    ahead = ReadAhead(hanging(), 100)
    found: list[list[RowBatch]] = []
    consumer = threading.Thread(target=lambda: found.append(list(ahead)))
    consumer.start()
    assert reading.wait(WAIT)
    ahead.close()
    consumer.join(WAIT)
    assert found == [[]]
    release.set()


def test_what_was_never_asked_for_leaves_no_thread() -> None:
    before = threading.active_count()
    ReadAhead(iter(Source(3)), 100).close()
    assert threading.active_count() == before
