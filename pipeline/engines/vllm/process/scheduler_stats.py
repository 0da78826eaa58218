"""What vLLM's scheduler says of itself after each step: counted, so that each call can take differences and means."""

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
        """All sums since the engine started."""
        with self._lock:
            return dict(self._sums)

    def new_preemptions(self) -> float:
        """The preemptions since the last call of this, so that two calls at the same time do not both count one."""
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


class Measures:
    """What one call has measured and not handed on yet: its seconds of rendering, and the engine's gauges meanwhile.

    Two calls at the same time measure the same engine: each of them its mean state while the call lasted. What happens
    once (``preemptions``) is told to one of them.
    """

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges
        self._sums = gauges.sums()
        self._given = 0.0
        self.render_seconds = 0.0

    def rest(self) -> dict[str, float]:
        """What has been added since this was asked last."""
        now, rendered = self._gauges.sums(), self.render_seconds
        found = {name: value - self._sums[name] for name, value in now.items()}
        found["preemptions"] = self._gauges.new_preemptions()
        found["render_seconds"] = rendered - self._given
        self._sums, self._given = now, rendered
        return found
