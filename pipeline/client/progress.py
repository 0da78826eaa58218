"""A job's progress for people: a moving line on a terminal, one line in a notebook, plain lines elsewhere.

The commands and ``wait(progress=True)`` show the same.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

from pipeline.spec.rates import Rates, describe, describe_shortly, doing, waits
from pipeline.spec.status import JobStatus, Phase
from pipeline.spec.words import duration, is_terminal_size, printable
from storage.redaction import redact_text
from storage.states import JobState

_TEXT_CELLS = 80
"""What the words beside the bar may take; the bar gets the rest of the terminal."""
LINE_SECONDS = 10.0
"""Without a terminal: at most one line in this time."""
NOTEBOOK_SECONDS = 0.5
"""In a notebook, each change is a message to the browser: at most one in this time."""


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
    """Plain lines: one whenever the state or the phase changes, and at most one every ``LINE_SECONDS`` in between."""

    def __init__(self, write: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock, self._lock = write or _to_stderr, clock, threading.Lock()
        self._rates = Rates()
        self._last: tuple[JobState, str, float] | None = None
        self._early = threading.Timer(LINE_SECONDS, self._say_reading)
        self._early.daemon = True

    def __enter__(self) -> Self:
        self._early.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._early.cancel()

    def _say_reading(self) -> None:
        """Before the first status a job is planned, which may take long."""
        with self._lock:
            if self._last is None:
                self._write(f"{Phase.READING} for {duration(LINE_SECONDS)}")

    def update(self, status: JobStatus) -> None:
        """Take in the status; write a line when it is time for one."""
        with self._lock:
            now = self._clock()
            status = self._rates.update(status, now)
            at = (status.state, doing(status))
            if self._last is None or self._last[:2] != at or now - self._last[2] >= LINE_SECONDS:
                self._last = (*at, now)
                self._write(describe(status, self._rates, now))

    def notice(self, message: str) -> None:
        """Write the message unchanged."""
        with self._lock:
            self._write(message)


def console(**options: Any) -> Any:
    """A ``rich.console.Console`` on stderr that shows text unchanged, and shows nothing more once nobody reads it."""
    from rich.console import Console

    class Unheard(Console):
        """Rich ends the process instead, and with it the job."""

        def on_broken_pipe(self) -> None:
            self.quiet = True

    # Of a size that is none, Rich makes a terminal of no columns, or stumbles.
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES") or is_terminal_size(v)}
    return Unheard(stderr=True, markup=False, emoji=False, highlight=False, _environ=environ, **options)


class Bar(Silent):
    """One moving line, with notices above it. ``keep`` leaves the last status behind as a line.

    Times run on between the updates: also before the first, while the input is read.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, keep: bool = False) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = console()
        columns: list[Any] = [
            SpinnerColumn("line", style="none"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=max(8, min(40, self._console.width - _TEXT_CELLS))),
            _words(self._beside),
        ]
        self._rich = RichProgress(*columns, console=self._console, transient=True, refresh_per_second=5)
        self._rates, self._clock, self._lock, self._keep = Rates(), clock, threading.Lock(), keep
        self._status: JobStatus | None = None
        self._since = clock()
        self._task = self._rich.add_task(Phase.READING.value, total=None)

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()
        if self._keep and self._status is not None:
            self._console.print(printable(describe(self._status, self._rates, self._clock())), soft_wrap=True)

    def update(self, status: JobStatus) -> None:
        """Take in the status and move the bar."""
        with self._lock:
            now = self._clock()
            status = self._status = self._rates.update(status, now)
            self._since = now - (status.phase_seconds or 0.0)
            total = status.rows_total or None
            self._rich.update(self._task, description=doing(status), total=total, completed=status.rows_done)

    def _beside(self) -> str:
        now = self._clock()
        if self._status is None:
            return duration(now - self._since)
        seconds = now - self._since if waits(self._status) else None
        return describe_shortly(self._status, self._rates, now, seconds)

    def notice(self, message: str) -> None:
        """Print the message above the bar."""
        self._console.print(printable(redact_text(message)), soft_wrap=True)


def _words(text: Callable[[], str]) -> Any:
    """A column of rich's that asks for its words each time it is drawn."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Words(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(text())

    return Words()


class Notebook(Silent):
    """One line of output in a Jupyter notebook, which changes in its place. Needs no widgets."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates, self._clock, self._lock = Rates(), clock, threading.Lock()
        self._status: JobStatus | None = None
        self._shown_at = float("-inf")
        self._line: Any = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._show(describe(self._status, self._rates, self._clock()))

    def update(self, status: JobStatus) -> None:
        """Take in the status; change the line when it is time."""
        with self._lock:
            now = self._clock()
            status = self._rates.update(status, now)
            changed = self._status is None or doing(self._status) != doing(status)
            self._status = status
            if changed or now - self._shown_at >= NOTEBOOK_SECONDS:
                self._shown_at = now
                self._show(describe(status, self._rates, now))

    def notice(self, message: str) -> None:
        """Print the message above the line."""
        _to_stderr(message)

    def _show(self, text: str) -> None:
        from IPython import display

        show: Any = display.display
        data = {"text/plain": printable(text)}
        if self._line is None:
            self._line = show(data, raw=True, display_id=True)
        else:
            self._line.update(data, raw=True)


def progress(*, quiet: bool = False, keep: bool = False, write: Callable[[str], None] | None = None) -> Progress:
    """The kind of progress that suits where stderr goes; ``write`` takes the plain lines."""
    if quiet:
        return Silent()
    if _in_notebook():
        return Notebook()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Bar(keep=keep)
    return Lines(write)


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel; IPython is not imported for it."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


def _to_stderr(message: str) -> None:
    with suppress(OSError):  # a stderr that is full, or that nobody reads, ends no job
        for line in redact_text(message).splitlines():
            print(printable(line), file=sys.stderr, flush=True)  # noqa: T201 - progress is for people
