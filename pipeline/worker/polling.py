"""Threads that ask the database for work: at once when they are woken, and by themselves every few seconds."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from storage.errors import CommitUnknown, TransientError
from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)


class Poller:
    """``count`` threads, each of which calls ``look`` again as long as it returns true: it found work, and did it.

    Idle threads wait. :meth:`wake` makes one of them look at once. Without a wake-up one of them looks after a pause,
    which doubles from ``first`` to ``longest`` seconds while nothing is found, and is cut by up to a half at
    random so that the processes of a fleet do not ask at the same moment. So idling costs one look per pause, whatever
    ``count`` is. An error of ``look`` is logged, and counts as having found nothing.
    """

    def __init__(
        self,
        name: str,
        look: Callable[[], bool],
        *,
        count: int,
        longest: float,
        first: float | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.name = name
        self._look, self._count = look, count
        self._first, self._longest, self._jitter = longest / 8 if first is None else first, longest, jitter
        self._changed = threading.Condition()
        self._stopped = False
        self._asked = 0
        self._idle = 0
        self._pause = self._first
        self._due = 0.0
        self._error: str | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"rowmill-{name}-{number}", daemon=True) for number in range(count)
        ]

    def start(self) -> None:
        """Look for the first time, and go on."""
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """There may be work: one thread looks at once, or as soon as it has finished what it is doing."""
        with self._changed:
            self._asked = min(self._asked + 1, self._count)
            self._pause = self._first
            self._changed.notify()

    def stop(self) -> None:
        """Stop looking. Work that was found already goes on; :meth:`join` waits for it."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until every thread has finished its work, after :meth:`stop`."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    @property
    def free(self) -> int:
        """How many threads are idle and not yet woken."""
        with self._changed:
            return max(0, self._idle - self._asked)

    @property
    def trouble(self) -> str | None:
        """Why no work is found, if something is wrong: a thread has ended, or the last look failed."""
        with self._changed:
            if self._stopped:
                return None
            dead = sum(thread.ident is not None and not thread.is_alive() for thread in self._threads)
            return f"{dead} of {self._count} {self.name} threads have ended" if dead else self._error

    def _run(self) -> None:
        while self._wait():
            while self._found() and not self._stopped:
                pass

    def _wait(self) -> bool:
        """Until it is this thread's turn to look; false when there is nothing to look for any more."""
        with self._changed:
            self._idle += 1
            try:
                while not self._stopped:
                    left = self._due - time.monotonic()
                    if self._asked:
                        self._asked -= 1
                    elif left > 0:
                        self._changed.wait(left)
                        continue
                    # This look may lead to hours of work: from now on another thread keeps time.
                    self._plan_next()
                    return True
                return False
            finally:
                self._idle -= 1

    def _found(self) -> bool:
        error = None
        try:
            found = self._look()
        except (TransientError, CommitUnknown) as failure:
            found, error = False, str(failure)
            log.warning(
                "looking for work (%s) failed, trying again: %s", self.name, failure, action=Action.WORK_POLL_FAILED
            )
        except BaseException as failure:
            # A thread that died here would leave its slot idle until the process ends.
            found, error = False, f"{type(failure).__name__}: {failure}"
            log.exception("looking for work (%s) failed, trying again", self.name, action=Action.WORK_POLL_FAILED)
        with self._changed:
            self._error = error
            self._pause = self._first if found else min(2 * self._pause, self._longest)
            self._plan_next()
        return found

    def _plan_next(self) -> None:
        self._due = time.monotonic() + self._pause * (1 - self._jitter() / 2)
        self._changed.notify()  # whoever keeps time now waits for the new moment
