"""Where the time of an attempt goes, and what its engine measured: numbers that add up over attempts.

``attempt_seconds`` is from the first row to the end; ``read_seconds``, ``render_seconds`` (where the engine makes
prompts) and ``write_seconds`` (flushing and assembling) are spent by threads of their own, while the engine computes;
``engine_seconds`` are spent waiting for it; ``load_seconds`` waiting until it was loaded, before all that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Measures:
    """One attempt's. Each name is counted by one thread at a time."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._sums: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._rows = 0
        self._flush_seconds = 0.0

    def begin(self, load_seconds: float) -> None:
        """The engine is ready, after ``load_seconds``: the clock of the attempt starts."""
        self._began = time.monotonic()
        self._seconds["load_seconds"] = load_seconds

    def flushed(self, rows: int, seconds: float) -> None:
        """``rows`` more rows are durable; writing them took ``seconds``."""
        self._rows += rows
        self._flush_seconds += seconds

    @contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """Count the seconds of a block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began

    def reading(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the seconds it takes to get them are counted."""
        return self._timed("read_seconds", batches)

    def waiting(self, results: Iterable[T]) -> Iterator[T]:
        """The same results; the seconds until they come are counted."""
        return self._timed("engine_seconds", results)

    def _timed(self, name: str, items: Iterable[T]) -> Iterator[T]:
        source = iter(items)
        while True:
            with self.spent(name):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def add(self, measured: Mapping[str, float]) -> None:
        """What the engine measured with a batch of results."""
        for name, number in measured.items():
            self._sums[name] += number  # type: ignore[assignment]

    def so_far(self) -> dict[str, Any]:
        """The statistics of an attempt that broke off; none if its engine was never ready."""
        return {} if self._began is None else {"measured": self.total()}

    def summary(self) -> dict[str, Any]:
        """The statistics of an attempt that came to an end of its own: seconds, rows per second, and the sums."""
        seconds = self._elapsed()
        return {
            "seconds": round(seconds, 3),
            "flush_seconds": round(self._flush_seconds, 3),
            "rows_per_second": round(self._rows / seconds, 2) if seconds > 0 else 0.0,
            "measured": self.total(),
        }

    def total(self) -> dict[str, float]:
        """All sums and seconds, rounded, without those that are zero."""
        found: dict[str, float] = {
            **self._sums,
            **self._seconds,
            "rows": self._rows,
            "attempt_seconds": self._elapsed(),
        }
        found["write_seconds"] = found.get("write_seconds", 0.0) + self._flush_seconds
        return {name: round(number, 4) for name, number in found.items() if number}

    def _elapsed(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began


def of_job(attempts: Iterable[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Of a job: the sums over its attempts (each with when it ended, in seconds), and what goes by the clock.

    ``busy_seconds``: in which at least one attempt was at work; ``loading_seconds``: in which one waited for an engine.
    """
    pairs = [(measured, ended) for measured, ended in attempts]
    found = summed(measured for measured, _ in pairs)
    at_work = [(ended - measured.get("attempt_seconds", 0), ended) for measured, ended in pairs]
    loads = [
        (began - measured.get("load_seconds", 0), began)
        for (measured, _), (began, _) in zip(pairs, at_work, strict=True)
    ]
    for name, stretches in (("busy_seconds", at_work), ("loading_seconds", loads)):
        if seconds := round(_covered(stretches), 4):
            found[name] = seconds
    return found


def _covered(stretches: Iterable[tuple[float, float]]) -> float:
    """How long the line is that these cover together."""
    total, reached = 0.0, float("-inf")
    for low, high in sorted(stretches):
        total += max(0.0, high - max(low, reached))
        reached = max(reached, high)
    return total


def summed(attempts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of a job: the sums over its attempts."""
    found: dict[str, float] = {}
    for measured in attempts:
        for name, number in measured.items():
            found[name] = round(found.get(name, 0) + number, 4)
    return found


def derived(measured: Mapping[str, float]) -> dict[str, float]:
    """What the sums say: rates, hit rates, means, and shares of time, where they can be said. Rates are per second in
    which the job was at work (``busy_seconds``), or of its attempts, where that is not known.

    ``cache_hit_rate``: of the rows whose answers may be kept across jobs, those that were answered before.
    ``prefix_hit_rate``: of the prompt tokens that entered the engine, those found in its cache. ``kv_cache_use``,
    ``running_requests`` and ``waiting_requests``: means over the engine's steps. ``…_share``: of the attempts' time.
    """

    def ratio(above: float, below: str, of: Mapping[str, float] = measured) -> float | None:
        return round(above / of[below], 4) if of.get(below) else None

    clock = "busy_seconds" if measured.get("busy_seconds") else "attempt_seconds"
    asked = {"rows": measured.get("cache_hits", 0) + measured.get("cache_misses", 0)}
    tokens = measured.get("prompt_tokens", 0) + measured.get("completion_tokens", 0)
    found = {
        "rows_per_second": ratio(measured.get("rows", 0), clock),
        "tokens_per_second": ratio(tokens, clock),
        "cache_hit_rate": ratio(measured.get("cache_hits", 0), "rows", asked),
        "prefix_hit_rate": ratio(measured.get("cached_tokens", 0), "prompt_tokens"),
        **{
            name: ratio(measured.get(name, 0), "engine_steps")
            for name in ("kv_cache_use", "running_requests", "waiting_requests")
        },
        **{
            f"{name}_share": ratio(measured.get(f"{name}_seconds", 0), "attempt_seconds")
            for name in ("read", "render", "engine", "write")
            if f"{name}_seconds" in measured
        },
    }
    return {name: number for name, number in found.items() if number is not None}
