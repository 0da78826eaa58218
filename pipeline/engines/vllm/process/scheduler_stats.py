"""What vLLM's scheduler says of itself after each step: counted, so that differences and means can be taken."""

from __future__ import annotations

import threading
import time
from typing import Any


class Gauges:
    """Sums over the engine's steps; the mean of a gauge over some time is the growth of its sum over that of
    ``engine_steps``.

    ``running_requests`` and ``waiting_requests`` are requests; ``kv_cache_use`` is the share of the cache in use, 0 to
    1; ``preemptions`` counts requests that were thrown out of a full cache and started again. Any thread may ask.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = dict.fromkeys(
            ("engine_steps", "running_requests", "waiting_requests", "kv_cache_use", "preemptions"), 0.0
        )
        self._told_preemptions = 0.0
        self.progress_at = time.monotonic()
        """When the engine last did something, or had nothing to do (``time.monotonic``)."""

    def sums(self) -> dict[str, float]:
        """All of them, since the engine started."""
        with self._lock:
            return dict(self._sums)

    def new_preemptions(self) -> float:
        """Those that this has told nobody yet: two calls at the same time must not both count one."""
        with self._lock:
            new = self._sums["preemptions"] - self._told_preemptions
            self._told_preemptions = self._sums["preemptions"]
            return new

    def touch(self) -> None:
        """The engine has nothing to do."""
        self.progress_at = time.monotonic()

    def step(self, scheduler: Any) -> None:
        """One step: vLLM's ``SchedulerStats``, where it has them."""
        self.progress_at = time.monotonic()
        if scheduler is None:
            return
        found = scheduler.prefix_cache_stats
        with self._lock:
            self._sums["engine_steps"] += 1
            self._sums["running_requests"] += scheduler.num_running_reqs
            self._sums["waiting_requests"] += scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self._sums["kv_cache_use"] += scheduler.kv_cache_usage
            self._sums["preemptions"] += found.preempted_requests if found is not None else 0

    def factory(self) -> Any:
        """What vLLM makes its loggers with: a class of one that reports here.

        It passes for vLLM's Prometheus logger, which would otherwise be added, and observes every token of every
        request in a dozen histograms that nobody reads.
        """
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        gauges = self

        class Logger(PrometheusStatLogger):
            def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
                """Registers nothing."""

            def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
                gauges.step(scheduler_stats)

            def _nothing(self, *_: Any, **__: Any) -> None:
                """Nobody listens."""

            log = log_engine_initialized = log_metrics_info = _nothing
            record_sleep_state = record_admission_rejection = _nothing

        return Logger
