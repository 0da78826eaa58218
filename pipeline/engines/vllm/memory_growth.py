"""Whether the processes of an engine have grown so far that it has to be started again."""

from __future__ import annotations

import psutil

from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.host.memory import memory_bytes

MEMORY_SHARE, GROWTH_SHARE = 0.8, 0.1
"""Shares of the machine's memory. An engine that takes more than the first, and has grown by more than the second since
its first call, is started again."""


class MemoryGrowth:
    """``limit``: bytes of the engine's processes and of this one, in place of the shares. ``exceeded``: stays true."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._first = 0
        self.exceeded = False

    def look(self, running: RunningVllm) -> None:
        """Measure, after a call of the engine."""
        if running.dead:
            return
        now = running.memory_bytes() + psutil.Process().memory_info().rss
        machine = memory_bytes()
        self._first = self._first or now
        limit = self._limit
        if limit is None:
            limit = int(max(MEMORY_SHARE * machine, self._first + GROWTH_SHARE * machine))
        self.exceeded = self.exceeded or now > limit
