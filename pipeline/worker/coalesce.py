"""Limits concurrent callers; extra callers return at once and their request is coalesced."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Gate:
    """Lets ``count`` callers in at a time.

    A caller too many is not kept waiting, and nothing is lost by it: one of those inside does its work once more.
    """

    def __init__(self, count: int) -> None:
        self._free = threading.Semaphore(count)
        self._asked = threading.Event()

    def run(self, work: Callable[[], object]) -> None:
        """Do ``work``, or have it done by a caller who is inside already; then this returns at once."""
        self._asked.set()
        # Looked at again after leaving: somebody may have asked after the work had looked for the last time.
        while self._asked.is_set() and self._free.acquire(blocking=False):
            try:
                self._asked.clear()
                work()
            finally:
                self._free.release()
