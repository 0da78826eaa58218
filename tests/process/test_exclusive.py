"""Who may run alone, and who makes room for it: threads that wait on each other, and never for good."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.engines.base import Cancellation
from pipeline.process.exclusive import MAKING_ROOM, Isolation

SECONDS = 30.0
"""Longer than anything here takes: only a deadlock gets there."""


def test_whoever_wants_to_run_alone_gets_it_once_the_others_have_made_room() -> None:
    isolation = Isolation()
    others = [isolation.turn(Cancellation()) for _ in range(2)]
    lonely = isolation.turn(Cancellation())
    with ThreadPoolExecutor() as threads:
        with others[0].together() as first, others[1].together() as second:
            asked = threads.submit(lonely.alone)
            assert first.wait(SECONDS) and second.wait(SECONDS)
            assert (first.reason, second.reason) == (MAKING_ROOM, MAKING_ROOM)
            assert not asked.done()
        assert asked.result(SECONDS)

        def again() -> bool:
            with others[0].together() as stop:
                return stop.cancelled

        waiting = threads.submit(again)
        assert not waiting.done()
        lonely.close()
        assert waiting.result(SECONDS) is False
    lonely.close()


def test_two_that_want_to_run_alone_take_turns() -> None:
    isolation = Isolation()
    one, two = (isolation.turn(Cancellation()) for _ in range(2))
    assert one.alone() and one.alone()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(two.alone)
        assert not asked.done()
        one.close()
        assert asked.result(SECONDS)


@pytest.mark.parametrize("wish", ["alone", "together"])
def test_a_wait_ends_when_the_attempt_is_cancelled(wish: str) -> None:
    isolation, cancel = Isolation(), Cancellation()
    first, second = isolation.turn(Cancellation()), isolation.turn(cancel)
    assert first.alone()

    def ask() -> bool:
        if wish == "alone":
            return second.alone()
        with second.together() as stop:
            return not stop.cancelled

    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask)
        cancel.cancel("drained")
        assert asked.result(SECONDS) is False
    second.close()
    # Nothing of it is left that others would wait for.
    first.close()
    assert first.alone()


def test_a_round_is_stopped_with_its_attempt() -> None:
    isolation, cancel = Isolation(), Cancellation()
    with isolation.turn(cancel).together() as stop:
        cancel.cancel("job cancelled")
        assert stop.reason == "job cancelled"


def test_many_at_once_never_overlap_with_one_alone() -> None:
    isolation, lock = Isolation(), threading.Lock()
    inside = {"together": 0, "alone": 0}
    wrong: list[dict[str, int]] = []

    def count(kind: str, change: int) -> None:
        with lock:
            inside[kind] += change
            if inside["alone"] > 1 or (inside["alone"] and inside["together"]):
                wrong.append(dict(inside))

    def attempt(number: int) -> None:
        turn = isolation.turn(Cancellation())
        for at in range(50):
            if (number + at) % 5 == 0:
                assert turn.alone()
                count("alone", 1)
                count("alone", -1)
                turn.close()
            else:
                with turn.together():
                    count("together", 1)
                    count("together", -1)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(attempt, number) for number in range(8)]:
            done.result(SECONDS)
    assert not wrong
