"""A worker that lacks what a queue's shards need leaves them to the others for a while.

A worker that lacks something fails fast, so it would claim shard after shard and use up their retry budgets. It claims
again by itself when the time is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

HOLD_SECONDS = 5.0
LONGEST_HOLD_SECONDS = 60.0


class CircuitBreaker:
    """Stops claiming from a queue after failures that this worker caused: twice as long after each one in a row. A
    success closes it."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._queues: dict[str, tuple[float, float]] = {}

    def record(self, queue: str, fit: bool) -> None:
        """An attempt has ended: ``fit`` unless what failed may be this worker alone."""
        with self._lock:
            if fit:
                self._queues.pop(queue, None)
                return
            last, _ = self._queues.get(queue, (HOLD_SECONDS / 2, 0.0))
            hold = min(2 * last, LONGEST_HOLD_SECONDS)
            self._queues[queue] = hold, self._now() + hold

    def is_open(self, queue: str) -> bool:
        """Whether nothing is to be claimed from the queue yet."""
        with self._lock:
            return queue in self._queues and self._now() < self._queues[queue][1]
