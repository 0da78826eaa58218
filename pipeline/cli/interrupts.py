"""Ctrl-C, SIGTERM and SIGHUP during a run: the first asks for a clean end, the next one ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from pipeline.cli import errors
from pipeline.cli.command import Invocation

_STOP = 0
_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_KEY_PRESS_SECONDS = 0.5
"""Wrappers pass on a Ctrl-C that the process already got from the terminal: the second one is not a second wish."""


class InterruptWatch:
    """While entered, signals come to a thread of its own instead of the main one.

    A Python signal handler waits until the main thread leaves native code, and may not take a lock that the main
    thread holds. So the handler does nothing; the interpreter's C handler writes the signal's number to a pipe
    (``signal.set_wakeup_fd``), and the thread that reads it calls ``first``, and later ``again``. Outside the main
    thread nothing is installed.
    """

    def __init__(self, first: Callable[[], None], again: Callable[[], None]) -> None:
        self._first, self._again = first, again
        self._installed: dict[signal.Signals, Any] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="rowmill-interrupts", daemon=True)
        self._thread.start()
        for number in _WATCHED:
            # nohup ignores SIGHUP on purpose. A shell that starts a job with & ignores SIGINT too, but there it still
            # comes only from someone who means this process.
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._installed[number] = signal.signal(number, _nothing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        for number, handler in self._installed.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.set_blocking(self._write, True)
        os.write(self._write, bytes([_STOP]))
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        began: float | None = None
        while data := os.read(self._read, 64):
            for number in data:
                if number == _STOP:
                    return
                if number not in _WATCHED:
                    continue
                if began is None:
                    began = time.monotonic()
                    self._first()
                elif time.monotonic() - began > _SAME_KEY_PRESS_SECONDS:
                    self._again()


def _nothing(number: int, frame: FrameType | None) -> None:
    """The signal has been noted by the wake-up pipe."""


def end_now(message: str, code: int) -> None:
    """Say why (unless ``message`` is empty), show the terminal's cursor again, and end without cleaning up."""
    cursor = "\x1b[?25h" if os.isatty(2) else ""
    os.write(2, (cursor + (message and f"\n{message}\n")).encode())
    os._exit(code)


def service_interrupts(invocation: Invocation, stop: Callable[[], object]) -> InterruptWatch:
    """The watch of a command that runs until it is stopped: the first signal calls ``stop``, the next ends at once."""

    def first() -> None:
        stop()
        invocation.notice("ending: what is finished is kept; press Ctrl-C again to end at once")

    def again() -> None:
        farewell = "" if invocation.service_log else "ended at once; everything flushed before is safe"
        end_now(farewell, errors.SIGNALLED)

    return InterruptWatch(first, again)
