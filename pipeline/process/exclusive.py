"""A readers-writer lock of one process whose readers can be preempted: shards share the engine, or one has it alone.

All shards in flight share an engine and the process. During the search for a row that kills them, nothing else may be
inside the engine: else a crash says nothing about the rows that were noted as isolated.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from pipeline.engines.base import Cancellation

Waiting = Callable[[], AbstractContextManager[object]]

PREEMPTED = "another shard of this process has to run alone"


class PreemptibleLock:
    """One per process. Each attempt has a :class:`LockHandle`, which the thread that uses it releases."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shared: dict[LockHandle, Cancellation] = {}
        self._wanting: deque[LockHandle] = deque()
        """Handles that hold the lock alone (the first, once nobody shares it) or want to, in order of arrival."""

    def handle(self, cancel: Cancellation, waiting: Waiting = nullcontext) -> LockHandle:
        """A new handle, also usable in a ``with``; ``cancel`` ends its waits, and each lies within a ``waiting()``."""
        return LockHandle(self, cancel, waiting)


class LockHandle:
    """One attempt's access to a :class:`PreemptibleLock`. Not for several threads."""

    def __init__(self, lock: PreemptibleLock, cancel: Cancellation, waiting: Waiting) -> None:
        self._lock, self._cancel, self._waiting = lock, cancel, waiting

    def __enter__(self) -> LockHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextmanager
    def shared(self) -> Iterator[Cancellation]:
        """Share the lock, once nobody holds it exclusively or wants to; until then, wait.

        Yields a cancellation for the block: it fires when the attempt's does, and when somebody wants the lock
        exclusively. Then the block has to end; the attempt may share the lock again for the rest of its rows.
        """
        lock = self._lock
        stop = Cancellation()
        self._wait_for(lambda: not lock._wanting)
        with lock._changed:
            lock._shared[self] = stop
            if lock._wanting:  # it was cancelled while it waited, or somebody came just now
                stop.cancel(PREEMPTED)
        forget = self._cancel.on_cancel(lambda: stop.cancel(self._cancel.reason or "cancelled"))
        try:
            yield stop
        finally:
            forget()
            with lock._changed:
                del lock._shared[self]
                lock._changed.notify_all()

    def exclusive(self) -> bool:
        """Hold the lock alone from now on, until :meth:`release`; false when cancelled while others still shared it."""
        lock = self._lock
        with lock._changed:
            if self not in lock._wanting:
                lock._wanting.append(self)
            others = list(lock._shared.values())
        for other in others:
            other.cancel(PREEMPTED)
        self._wait_for(lambda: lock._wanting[0] is self and not lock._shared)
        return not self._cancel.cancelled

    def release(self) -> None:
        """Hold the lock alone no longer. Safe to call again."""
        lock = self._lock
        with lock._changed:
            if self in lock._wanting:
                lock._wanting.remove(self)
                lock._changed.notify_all()

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready()``, or until the attempt is cancelled."""
        changed = self._lock._changed
        with changed:
            if self._cancel.cancelled or ready():
                return

        def wake() -> None:
            with changed:
                changed.notify_all()

        forget = self._cancel.on_cancel(wake)
        try:
            with self._waiting(), changed:
                changed.wait_for(lambda: self._cancel.cancelled or ready())
        finally:
            forget()
