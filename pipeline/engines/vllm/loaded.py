"""What loading a vLLM engine makes, and closing it ends: its processes, and the bounds of the work inside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.engines.vllm.requests.admission import AdmissionLimit
from pipeline.engines.vllm.requests.media_budget import MediaMemoryBudget, media_bytes
from pipeline.host.memory import memory_bytes

WINDOW_TOKENS = 2**22
"""Most prompt tokens inside vLLM where its cache does not hold half as many: some 150 MiB in its processes."""
MEDIA_WINDOW_SHARE, MEDIA_WINDOW_BYTES = 1 / 16, 4 * 2**30
"""What prepared media inside vLLM may take: this share of the machine's memory, at most these bytes."""
MEMORY_SHARE, GROWTH_SHARE = 0.8, 0.1
"""Shares of the machine's memory. An engine that takes more than the first, and has grown by more than the second since
its first call, is started again."""


@dataclass(slots=True)
class LoadedVllm:
    """``window``: the requests that may be inside ``running``; ``media``: the memory that their media may take;
    ``memory_limit``: bytes of the engine's processes and of this one above which it is started again."""

    running: RunningVllm
    window: AdmissionLimit
    media: MediaMemoryBudget
    memory_limit: int | None = None
    needs_restart: bool = False
    _first_bytes: int = 0

    @classmethod
    def of(cls, running: RunningVllm, options: Mapping[str, Any]) -> LoadedVllm:
        """Bounds as the engine's options have them, else as vLLM's scheduler and cache and the machine's memory do."""
        config = running.config
        cached = (config.cache_config.num_gpu_blocks or 0) * (config.cache_config.block_size or 0)
        # The scheduler's are a single engine's, of which there is one for each rank; the blocks are all of them.
        ranks = config.parallel_config.data_parallel_size
        window = AdmissionLimit(
            int(options.get("window", 2 * config.scheduler_config.max_num_seqs * ranks)),
            int(options.get("window_tokens", max(WINDOW_TOKENS * ranks, 2 * cached))),
        )
        most = min(MEDIA_WINDOW_BYTES, MEDIA_WINDOW_SHARE * memory_bytes())
        media = MediaMemoryBudget(int(options.get("media_window_bytes", most)), media_bytes)
        return cls(running, window, media, options.get("recycle_bytes"))

    def look_at_memory(self) -> None:
        """After each call: set ``needs_restart`` once the processes and this one take too much memory. It stays set."""
        if self.running.dead:
            return
        now, machine = self.running.memory_bytes() + psutil.Process().memory_info().rss, memory_bytes()
        self._first_bytes = self._first_bytes or now
        limit = self.memory_limit
        if limit is None:
            limit = int(max(MEMORY_SHARE * machine, self._first_bytes + GROWTH_SHARE * machine))
        self.needs_restart = self.needs_restart or now > limit

    def close(self) -> None:
        """End the processes, and the threads that prepare media."""
        self.media.close()
        self.running.stop()
