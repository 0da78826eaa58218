"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

from pipeline.cli.command import say
from pipeline.cli.output import count, duration, plural, printable
from pipeline.status import JobStatus
from storage.states import JobState

WINDOW_SECONDS = 60.0
"""Rates are taken over about this long: two flushes at the default ``flush_seconds``."""
_TEXT_CELLS = 80
"""What the words beside the bar may take; the bar gets the rest of the terminal."""
LINE_SECONDS = 10.0
"""Without a terminal: at most one line in this time."""


class Rates:
    """Rows and tokens per second, and when the job will be done, from what its status said so far.

    Rates are taken between the moments at which counts moved, since work may show in steps, as it is flushed. Only
    ``in_progress`` counts, so that planning and loading do not slow the estimate. Times are seconds of any one clock.
    """

    def __init__(self) -> None:
        self._moves: deque[tuple[float, int, int]] = deque()
        self._total = 0
        self._gen = -1
        self._most = 0

    def update(self, status: JobStatus, at: float) -> JobStatus:
        """Take in what was true at ``at``; the status to show.

        Its ``rows_done`` never falls within a generation: rows may be missed for a moment while they pass from memory
        to a file, or from a shard's count to the job's.
        """
        if status.gen != self._gen:
            self._gen, self._most = status.gen, 0
            self._moves.clear()
        self._most = max(self._most, status.rows_done)
        self._total = status.rows_total
        if status.state is JobState.IN_PROGRESS:
            spent = status.tokens.get("prompt_tokens", 0) + status.tokens.get("completion_tokens", 0)
            counts = (self._most, max(spent, self._moves[-1][2]) if self._moves else spent)
            if not self._moves or counts != self._moves[-1][1:]:
                self._moves.append((at, *counts))
            while len(self._moves) > 2 and at - self._moves[1][0] > WINDOW_SECONDS:
                self._moves.popleft()
        return replace(status, rows_done=self._most)

    def _per_second(self, of: int) -> float | None:
        if len(self._moves) < 2:
            return None
        first, last = self._moves[0], self._moves[-1]
        seconds = last[0] - first[0]
        return (last[of] - first[of]) / seconds if seconds > 0 else None

    @property
    def rows(self) -> float | None:
        """Rows per second; ``None`` before counts have moved once."""
        return self._per_second(1)

    @property
    def tokens(self) -> float | None:
        """Prompt and completion tokens per second; ``None`` for jobs that count none."""
        return self._per_second(2) or None

    def remaining(self, at: float) -> float | None:
        """Seconds until the last row is done, as seen at ``at``."""
        rate = self.rows
        if not rate:
            return None
        moved, done, _ = self._moves[-1]
        return max(0.0, moved + (self._total - done) / rate - at)


def describe(status: JobStatus, rates: Rates, at: float) -> str:
    """One line: ``in_progress: 4,096 of 20,000 rows (20%), 813 rows/s, 14,201 tokens/s, 20 s left, 3 failed``."""
    if not status.rows_total and not status.terminal:
        return status.state.value
    share = f" ({100 * status.rows_done // status.rows_total}%)" if status.rows_total else ""
    parts = [f"{status.rows_done:,} of {plural(status.rows_total, 'row')}{share}", *_measures(status, rates, at)]
    return f"{status.state.value}: {', '.join(parts)}"


def describe_shortly(status: JobStatus, rates: Rates, at: float) -> str:
    """What stands beside the bar: ``4,096/20,000 · 813 rows/s · 14,201 tokens/s · 20 s left · 3 failed``."""
    if not status.rows_total:
        return ""
    return " · ".join([f"{status.rows_done:,}/{status.rows_total:,}", *_measures(status, rates, at)])


def _measures(status: JobStatus, rates: Rates, at: float) -> list[str]:
    pairs = ((rates.rows, "rows/s"), (rates.tokens, "tokens/s"))
    parts = [f"{count(value)} {unit}" for value, unit in pairs if value is not None]
    left = rates.remaining(at)
    if left is not None and status.state is JobState.IN_PROGRESS:
        parts.append(f"{duration(left)} left")
    if status.rows_failed:
        parts.append(f"{status.rows_failed:,} failed")
    return parts


class Progress(Protocol):
    """Where a job's progress goes. Used as a context manager; both calls may come from any thread."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def update(self, status: JobStatus) -> None: ...
    def notice(self, message: str) -> None: ...


class Silent:
    """For ``--quiet``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, status: JobStatus) -> None:
        """Say nothing."""

    def notice(self, message: str) -> None:
        """Say nothing."""


class Lines(Silent):
    """Plain lines: one whenever the state changes, and at most one every ``LINE_SECONDS`` in between."""

    def __init__(self, write: Callable[[str], None] = say, clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock, self._lock = write, clock, threading.Lock()
        self._rates = Rates()
        self._last: tuple[JobState, float] | None = None

    def update(self, status: JobStatus) -> None:
        """Take in the status; write a line when it is time for one."""
        with self._lock:
            now = self._clock()
            status = self._rates.update(status, now)
            if self._last is None or self._last[0] is not status.state or now - self._last[1] >= LINE_SECONDS:
                self._last = (status.state, now)
                self._write(describe(status, self._rates, now))

    def notice(self, message: str) -> None:
        """Write the message as it is."""
        with self._lock:
            self._write(message)


class Bar(Silent):
    """One moving line, with notices above it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        columns: list[Any] = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=max(8, min(40, self._console.width - _TEXT_CELLS))),
            TextColumn("{task.fields[text]}"),
        ]
        self._rich = RichProgress(*columns, console=self._console, transient=True, refresh_per_second=5)
        self._task = self._rich.add_task("starting", total=None, text="")
        self._rates, self._clock, self._lock = Rates(), clock, threading.Lock()

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()

    def update(self, status: JobStatus) -> None:
        """Take in the status and move the bar."""
        with self._lock:
            now = self._clock()
            status = self._rates.update(status, now)
            self._rich.update(
                self._task,
                description="running" if status.state is JobState.IN_PROGRESS else status.state.value,
                total=status.rows_total or None,
                completed=status.rows_done,
                text=describe_shortly(status, self._rates, now),
            )

    def notice(self, message: str) -> None:
        """Print the message above the bar."""
        self._console.print(printable(message), soft_wrap=True)


def progress(*, quiet: bool) -> Progress:
    """The kind of progress that suits where stderr goes."""
    if quiet:
        return Silent()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Bar()
    return Lines()
