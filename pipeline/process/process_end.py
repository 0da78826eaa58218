"""What has to be ended before this process does, whichever way it ends.

``atexit`` is too late: before it, Python shuts down every ``concurrent.futures`` pool, and nothing can be flushed any
more. A signal whose action is Python's default ends the process without any of it. So the end is watched for in both
places, as long as there is something to end. Only ``SIGKILL`` and ``os._exit`` come without warning.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import ctypes
import os
import signal
import threading
import time
from types import FrameType
from typing import Final, NoReturn, Protocol

from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_SAME_WISH_SECONDS = 0.5
"""Wrappers pass on a Ctrl-C that this process already got from the terminal, and ``timeout`` sends its signal to the
process and to its group: the second one is not a second wish."""


class Endable(Protocol):
    """Something at work in threads of this process. Compared by identity."""

    def stop(self) -> None:
        """Tell it to end. Returns at once; safe to repeat."""

    def close(self) -> None:
        """Tell it to end, and wait until it has. Safe to repeat, and from several threads."""


_lock = threading.Lock()
_at_work: set[Endable] = set()
_hooked = False
ending = threading.Event()
"""Set once the process has begun to end."""
_killed_by: list[int] = []
"""The signal that ends the process, once there is one."""
_asked_at = float("-inf")
"""When that came, by the monotonic clock."""
_set_action = ctypes.pythonapi.PyOS_setsig
"""``signal.signal`` of C: other threads than the main one may call it. ``None`` is the default action."""
_set_action.argtypes = (ctypes.c_int, ctypes.c_void_p)
_set_action.restype = ctypes.c_void_p


def add(work: Endable) -> None:
    """End ``work`` before the process ends. Called again, it changes nothing. In the main thread, :func:`watch`."""
    global _hooked
    with _lock:
        _at_work.add(work)
        if not _hooked:
            # Private, but what concurrent.futures itself goes by. Without it, the end of pools comes first.
            register = getattr(threading, "_register_atexit", atexit.register)
            register(_end)
            _hooked = True
    watch()


def watch() -> None:
    """Watch for signals that would kill the process at once: ``SIGTERM``, ``SIGHUP``, and ``SIGINT`` where it is not
    Ctrl-C. Those that somebody else handles or ignores are left alone. Only the main thread can; in others, nothing.
    """
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _on_signal)


def discard(work: Endable) -> None:
    """``work`` has ended by itself. Once nothing is at work, the main thread stops watching for signals."""
    with _lock:
        _at_work.discard(work)
        left = bool(_at_work)
    if not left and threading.current_thread() is threading.main_thread():
        _unwatch()


def await_signal() -> None:
    """Once a signal is ending the process: wait for that. Otherwise return at once."""
    while _killed_by:
        time.sleep(1.0)


def _end() -> None:
    ending.set()
    began = time.monotonic()
    while True:
        try:
            _end_work()
            break
        except KeyboardInterrupt:
            if time.monotonic() - began > _SAME_WISH_SECONDS:
                raise
    await_signal()


def _end_work() -> None:
    with _lock:
        found = list(_at_work)
    for work in found:
        work.stop()
    for work in found:
        try:
            work.close()
        except Exception:
            log.exception("work in the background did not end cleanly", action=Action.PROCESS_END_FAILED)


def _on_signal(number: int, frame: FrameType | None) -> None:
    # It may have come while the main thread held any lock, so no lock is taken here, and no threading.Thread is made.
    global _asked_at
    now = time.monotonic()
    if _killed_by and now - _asked_at < _SAME_WISH_SECONDS:
        return
    if _killed_by or not _at_work:  # asked again, the process ends at once
        _die(number)
    _asked_at = now
    _killed_by.append(number)
    ending.set()
    try:
        _thread.start_new_thread(_end_and_die, (number,))
    except RuntimeError:  # the interpreter is ending already, and what is at work with it
        _killed_by.clear()


def _end_and_die(number: int) -> None:
    try:
        _end_work()
    finally:
        _die(number)


def _die(number: int) -> NoReturn:
    """End as the signal's default action would have: others see by which signal the process ended.

    Any thread may do so: the main thread may be in native code for long, where it takes no signals.
    """
    _set_action(number, None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    signal.raise_signal(number)
    os._exit(128 + number)  # process 1 of a container, which no default action ends


def _unwatch() -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.SIG_DFL)


def _in_child() -> None:
    """A forked child has none of the threads that were at work, and ends by itself."""
    global _lock
    _lock = threading.Lock()
    _at_work.clear()
    _killed_by.clear()
    ending.clear()
    with contextlib.suppress(ValueError):  # not the main thread of the main interpreter
        _unwatch()


os.register_at_fork(after_in_child=_in_child)
