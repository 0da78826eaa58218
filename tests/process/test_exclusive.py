"""Who may run alone, and who makes room for it: threads that wait on each other, and never for good."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.engines.base import Cancellation
from pipeline.process.exclusive import PREEMPTED, PreemptibleLock

SECONDS = 30.0
"""Longer than anything here takes: only a deadlock gets there."""


def test_whoever_wants_to_run_alone_gets_it_once_the_others_have_made_room() -> None:
    lock = PreemptibleLock()
    others = [lock.handle(Cancellation()) for _ in range(2)]
    lonely = lock.handle(Cancellation())
    with ThreadPoolExecutor() as threads:
        with others[0].shared() as first, others[1].shared() as second:
            asked = threads.submit(lonely.exclusive)
            assert first.wait(SECONDS) and second.wait(SECONDS)
            assert (first.reason, second.reason) == (PREEMPTED, PREEMPTED)
            assert not asked.done()
        assert asked.result(SECONDS)

        def again() -> bool:
            with others[0].shared() as stop:
                return stop.cancelled

        waiting = threads.submit(again)
        assert not waiting.done()
        lonely.release()
        assert waiting.result(SECONDS) is False
    lonely.release()


def test_two_that_want_to_run_alone_take_turns() -> None:
    lock = PreemptibleLock()
    one, two = (lock.handle(Cancellation()) for _ in range(2))
    assert one.exclusive() and one.exclusive()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(two.exclusive)
        assert not asked.done()
        one.release()
        assert asked.result(SECONDS)


@pytest.mark.parametrize("wish", ["exclusive", "shared"])
def test_a_wait_ends_when_the_attempt_is_cancelled(wish: str) -> None:
    lock, cancel = PreemptibleLock(), Cancellation()
    first, second = lock.handle(Cancellation()), lock.handle(cancel)
    assert first.exclusive()

    def ask() -> bool:
        if wish == "exclusive":
            return second.exclusive()
        with second.shared() as stop:
            return not stop.cancelled

    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask)
        cancel.cancel("drained")
        assert asked.result(SECONDS) is False
    second.release()
    # Nothing of it is left that others would wait for.
    first.release()
    assert first.exclusive()


def test_a_round_is_stopped_with_its_attempt() -> None:
    lock, cancel = PreemptibleLock(), Cancellation()
    with lock.handle(cancel).shared() as stop:
        cancel.cancel("job cancelled")
        assert stop.reason == "job cancelled"


def test_many_at_once_never_overlap_with_one_alone() -> None:
    lock, counting = PreemptibleLock(), threading.Lock()
    inside = {"shared": 0, "exclusive": 0}
    wrong: list[dict[str, int]] = []

    def count(kind: str, change: int) -> None:
        with counting:
            inside[kind] += change
            if inside["exclusive"] > 1 or (inside["exclusive"] and inside["shared"]):
                wrong.append(dict(inside))

    def attempt(number: int) -> None:
        handle = lock.handle(Cancellation())
        for at in range(50):
            if (number + at) % 5 == 0:
                assert handle.exclusive()
                count("exclusive", 1)
                count("exclusive", -1)
                handle.release()
            else:
                with handle.shared():
                    count("shared", 1)
                    count("shared", -1)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(attempt, number) for number in range(8)]:
            done.result(SECONDS)
    assert not wrong
