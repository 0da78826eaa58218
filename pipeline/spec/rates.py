"""Rows and tokens per second, the time that is left, and the words for them, from what a job's status says. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from pipeline.spec.status import JobStatus, Phase
from pipeline.spec.words import count, duration, plural
from storage.states import JobState

WINDOW_SECONDS = 180.0
"""Rates are taken over about this long: several flushes at the default ``flush_seconds``."""


class Rates:
    """Rows and tokens per second, and when the job will be done, from what its status said so far.

    Only time in which rows are computed counts, and only rows that were computed: not the planning, not the loading of
    an engine (a later one included), not rows that failed, most of which fail at once. Rates are taken between the
    moments at which counts moved, since work may show in steps, as it is flushed. Times are seconds of any one clock.
    """

    def __init__(self) -> None:
        self._moves: deque[tuple[float, int, int]] = deque()
        self._left = 0
        self._gen = -1
        self._most = 0
        self._spent = 0.0
        self._seen: tuple[float, bool] | None = None

    def update(self, status: JobStatus, at: float) -> JobStatus:
        """Take in what was true at ``at``; the status to show.

        Its ``rows_done`` never falls within a generation: rows may be missed for a moment while they pass from memory
        to a file, or from a shard's count to the job's.
        """
        if status.gen != self._gen:
            self._gen, self._most, self._seen = status.gen, 0, None
            self._moves.clear()
        self._most = max(self._most, status.rows_done)
        self._left = status.rows_total - self._most
        computes = status.state is JobState.IN_PROGRESS and status.phase in (None, Phase.COMPUTING)
        if self._seen is not None and self._seen[1]:
            self._spent += at - self._seen[0]
        self._seen = at, computes
        if status.state is JobState.IN_PROGRESS:
            self._move(max(0, self._most - status.rows_failed), _tokens(status))
        return replace(status, rows_done=self._most)

    def _move(self, rows: int, tokens: int) -> None:
        if self._moves:  # counts that fall for a moment stay
            rows, tokens = max(rows, self._moves[-1][1]), max(tokens, self._moves[-1][2])
        if not self._moves or (rows, tokens) != self._moves[-1][1:]:
            self._moves.append((self._spent, rows, tokens))
        while len(self._moves) > 2 and self._spent - self._moves[1][0] > WINDOW_SECONDS:
            self._moves.popleft()

    def _per_second(self, of: int) -> float | None:
        if len(self._moves) < 2:
            return None
        first, last = self._moves[0], self._moves[-1]
        seconds = last[0] - first[0]
        return (last[of] - first[of]) / seconds if seconds > 0 else None

    @property
    def rows(self) -> float | None:
        """Computed rows per second; ``None`` before any was."""
        return self._per_second(1)

    @property
    def tokens(self) -> float | None:
        """Prompt and completion tokens per second; ``None`` for jobs that count none."""
        return self._per_second(2) or None

    def remaining(self, at: float) -> float | None:
        """Seconds until the last row is done, as seen at ``at``."""
        rate = self.rows
        if not rate or self._seen is None:
            return None
        since = self._spent - self._moves[-1][0] + (at - self._seen[0] if self._seen[1] else 0.0)
        return max(0.0, self._left / rate - since)


def _tokens(status: JobStatus) -> int:
    return status.tokens.get("prompt_tokens", 0) + status.tokens.get("completion_tokens", 0)


def doing(status: JobStatus) -> str:
    """What the job is at, in a word or some: ``running``, ``loading the engine``, ``interrupted``, ``completed``."""
    if status.terminal:
        return status.state.value
    if not status.attended:
        return "interrupted" if status.interrupted else "nobody runs it"
    if status.state is JobState.IN_PROGRESS and status.phase in (None, Phase.COMPUTING):
        return "running"
    return status.state.value if status.phase is None else status.phase.value


def waits(status: JobStatus) -> bool:
    """Whether nothing is computed at the moment, so that what is shown is the time that passes."""
    return not status.terminal and status.attended and status.phase not in (None, Phase.COMPUTING)


def describe(status: JobStatus, rates: Rates, at: float, seconds: float | None = None) -> str:
    """One line: ``in_progress: 4,096 of 20,000 rows (20%), 813 rows/s, 14,201 tokens/s, 20 s left, 3 failed``, or
    ``in_progress: loading the engine for 12 s, 0 of 20,000 rows (0%)``. ``seconds``: how long the phase has lasted."""
    seconds = status.phase_seconds if seconds is None else seconds
    parts = [f"{doing(status)} for {duration(seconds or 0.0)}"] if waits(status) else []
    if status.rows_total or status.terminal:
        share = f" ({100 * status.rows_done // status.rows_total}%)" if status.rows_total else ""
        parts.append(f"{status.rows_done:,} of {plural(status.rows_total, 'row')}{share}")
        parts += _measures(status, rates, at)
    return f"{status.state.value}: {', '.join(parts)}" if parts else status.state.value


def describe_shortly(status: JobStatus, rates: Rates, at: float, seconds: float | None = None) -> str:
    """What stands beside the bar: ``4,096/20,000 · 813 rows/s · 14,201 tokens/s · 20 s left · 3 failed``."""
    seconds = status.phase_seconds if seconds is None else seconds
    parts = [duration(seconds or 0.0)] if waits(status) else []
    if status.rows_total:
        parts += [f"{status.rows_done:,}/{status.rows_total:,}", *_measures(status, rates, at)]
    return " · ".join(parts)


def _measures(status: JobStatus, rates: Rates, at: float) -> list[str]:
    pairs = ((rates.rows, "rows/s"), (rates.tokens, "tokens/s"))
    parts = [] if waits(status) else [f"{count(value)} {unit}" for value, unit in pairs if value]
    left = rates.remaining(at)
    if left is not None and status.state is JobState.IN_PROGRESS and not waits(status) and status.attended:
        parts.append(f"{duration(left)} left")
    if status.rows_failed:
        parts.append(f"{status.rows_failed:,} failed")
    return parts
