"""How many threads get in, and that what was asked of a full gate is done all the same."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.worker.coalesce import Gate

DEADLINE = 30.0


def test_no_more_get_in_than_may_and_the_others_do_not_wait() -> None:
    gate, go = Gate(2), threading.Event()
    inside = threading.Semaphore(0)
    rounds: list[int] = []

    def work() -> None:
        rounds.append(threading.get_ident())
        inside.release()
        assert go.wait(DEADLINE)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(gate.run, work) for _ in range(2)]
        try:
            assert inside.acquire(timeout=DEADLINE)
            assert inside.acquire(timeout=DEADLINE)
            gate.run(work)  # returns, although nobody may leave yet
            assert len(rounds) == 2
        finally:
            go.set()
        for item in running:
            item.result(DEADLINE)
    assert len(rounds) == 3, "one of those inside did what was asked of the full gate"
    assert threading.get_ident() not in rounds


def test_work_that_fails_leaves_the_gate_open() -> None:
    gate, done = Gate(1), []

    def fail() -> None:
        raise ValueError("scripted by the test")

    with pytest.raises(ValueError, match="scripted"):
        gate.run(fail)
    gate.run(lambda: done.append(1))
    assert done == [1]
