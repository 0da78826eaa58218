"""Threads that look for work: woken, or by themselves; nothing is waited for but signals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.worker.polling import Poller
from storage.errors import TransientError

FAR = 3600.0
LONG = 30.0


@contextmanager
def polling(look: Callable[[], bool], *, count: int = 1, first: float = FAR) -> Iterator[Poller]:
    poller = Poller("test", look, count=count, longest=FAR, first=first, jitter=lambda: 0.0)
    poller.start()
    try:
        yield poller
    finally:
        poller.stop()
        poller.join()


class Looks:
    """Counts the looks; ``answers`` are what they find, then nothing."""

    def __init__(self, *answers: bool | BaseException) -> None:
        self._answers = list(answers)
        self._semaphore = threading.Semaphore(0)

    def __call__(self) -> bool:
        self._semaphore.release()
        answer = self._answers.pop(0) if self._answers else False
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self._semaphore.acquire(timeout=LONG), "it did not look"

    @property
    def more(self) -> bool:
        return self._semaphore.acquire(blocking=False)


def test_it_looks_when_it_begins_and_when_it_is_woken() -> None:
    looks = Looks()
    with polling(looks) as poller:
        looks.wait()
        poller.wake()
        looks.wait()
    assert not looks.more


def test_it_looks_again_as_long_as_there_is_work() -> None:
    looks = Looks(True, True, True)
    with polling(looks):
        looks.wait(4)
    assert not looks.more


def test_it_looks_by_itself() -> None:
    looks = Looks()
    with polling(looks, first=0.001):
        looks.wait(3)


def test_an_error_ends_no_thread_and_is_told() -> None:
    looks = Looks(TransientError("the database is away"), ValueError("a defect"), SystemExit(3))
    with polling(looks) as poller:
        looks.wait()
        _until(lambda: poller.trouble == "the database is away")
        poller.wake()
        looks.wait()
        _until(lambda: poller.trouble == "ValueError: a defect")
        poller.wake()
        looks.wait()
        _until(lambda: poller.trouble == "SystemExit: 3")
        poller.wake()
        looks.wait()
        _until(lambda: poller.trouble is None)


def test_a_wake_up_while_all_are_busy_is_kept() -> None:
    begun, go_on, looked = threading.Event(), threading.Event(), Looks()

    def look() -> bool:
        if not begun.is_set():
            begun.set()
            assert go_on.wait(LONG)
            return False  # what came in the meantime it did not see
        return looked()

    with polling(look) as poller:
        assert begun.wait(LONG)
        assert poller.free == 0
        poller.wake()
        go_on.set()
        looked.wait()


def test_one_look_per_pause_whatever_the_number_of_threads() -> None:
    looks = Looks()
    with polling(looks, count=8) as poller:
        looks.wait()
        _until(lambda: poller.free == 8)
        assert not looks.more


def test_stop_waits_for_the_work_at_hand_and_begins_no_other() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def look() -> bool:
        begun.set()
        assert go_on.wait(LONG)
        return True

    poller = Poller("test", look, count=2, longest=FAR)
    poller.start()
    assert begun.wait(LONG)
    poller.stop()
    joined = threading.Thread(target=poller.join)
    joined.start()
    assert joined.is_alive()
    go_on.set()
    joined.join(LONG)
    assert not joined.is_alive()
    assert poller.trouble is None


def _until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(LONG * 100)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come true")
