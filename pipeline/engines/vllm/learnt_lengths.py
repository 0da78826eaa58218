"""The lengths of answers that recent jobs have had, for ordering the prompts of their next shards."""

from __future__ import annotations

import threading
from collections import OrderedDict

from pipeline.prefix.order import Lengths

MOST_JOBS = 16
"""Most jobs whose lengths of answers are remembered."""


class LearntLengths:
    """One for each engine, safe to share between threads; the job that was asked for longest ago is forgotten first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_work: OrderedDict[str, Lengths] = OrderedDict()

    def of(self, work: str, limit: int) -> Lengths:
        """Those of the job whose work hash is ``work``. ``limit``: tokens that an answer may have, if it is new."""
        with self._lock:
            found = self._by_work.setdefault(work, Lengths(limit))
            self._by_work.move_to_end(work)
            while len(self._by_work) > MOST_JOBS:
                self._by_work.popitem(last=False)
            return found
