"""Rounds of one process run side by side, or one of them alone: who runs alone when the engine dies is to blame.

An engine, and the process, are shared by the shards in flight. While a row that kills them is searched for, nothing
else may be inside, or a crash says nothing of the rows that were noted as running alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from pipeline.engines.base import Cancellation

Waiting = Callable[[], AbstractContextManager[object]]

MAKING_ROOM = "another shard of this process has to run alone"


class Isolation:
    """One per process. Each attempt has a :class:`Turn`, to be closed in the thread that uses it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together: dict[Turn, Cancellation] = {}
        self._wanting: deque[Turn] = deque()
        """Turns that run alone (the first, once nobody runs together) or want to, in the order in which they came."""

    def turn(self, cancel: Cancellation, waiting: Waiting = nullcontext) -> Turn:
        """An attempt's; ``cancel`` ends its waits, and each of them lies within a ``waiting()``."""
        return Turn(self, cancel, waiting)


class Turn:
    """One attempt's part in an :class:`Isolation`. Not for several threads."""

    def __init__(self, isolation: Isolation, cancel: Cancellation, waiting: Waiting) -> None:
        self._isolation, self._cancel, self._waiting = isolation, cancel, waiting

    @contextmanager
    def together(self) -> Iterator[Cancellation]:
        """Run beside the others, once nobody runs alone or wants to; until then, wait.

        Yields a cancellation for the round: it fires when the attempt's does, and when somebody wants to run alone.
        Then the round has to end; it may go on afterwards with what is left.
        """
        inside = self._isolation
        stop = Cancellation()
        self._wait_for(lambda: not inside._wanting)
        with inside._changed:
            inside._together[self] = stop
            if inside._wanting:  # it was cancelled while it waited, or somebody came just now
                stop.cancel(MAKING_ROOM)
        forget = self._cancel.on_cancel(lambda: stop.cancel(self._cancel.reason or "cancelled"))
        try:
            yield stop
        finally:
            forget()
            with inside._changed:
                del inside._together[self]
                inside._changed.notify_all()

    def alone(self) -> bool:
        """Run alone from now on, until :meth:`close`; false when cancelled while others still ran."""
        inside = self._isolation
        with inside._changed:
            if self not in inside._wanting:
                inside._wanting.append(self)
            others = list(inside._together.values())
        for other in others:
            other.cancel(MAKING_ROOM)
        self._wait_for(lambda: inside._wanting[0] is self and not inside._together)
        return not self._cancel.cancelled

    def close(self) -> None:
        """Run alone no longer. Safe to call again."""
        inside = self._isolation
        with inside._changed:
            if self in inside._wanting:
                inside._wanting.remove(self)
                inside._changed.notify_all()

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        """Until it is so, or the attempt is cancelled."""
        changed = self._isolation._changed
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
