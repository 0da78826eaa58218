"""A child process that outlives us by a moment, to end the engine's processes when we could not (``kill -9``).

It reads a pipe whose other end only we hold. While we live, it is told which processes to watch; when the pipe closes
without a farewell, we are gone, and it kills them and whatever they started. A process is known by its id *and* its
start time and is killed through a pidfd, so that a reused id is never hit. Run as a script, it imports the standard
library only and is up in some 20 ms. Linux only, as vLLM is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, Final

FAREWELL: Final = "farewell"


def start_time(pid: int) -> int | None:
    """When ``pid`` started, in clock ticks since boot; ``None`` when there is no such process, or only its zombie."""
    try:
        # The command name, field 2, may hold spaces and parentheses: fields are counted from its closing one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _parents() -> dict[int, int]:
    """Every process's parent."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def _with_descendants(roots: set[int]) -> list[int]:
    parents, family = _parents(), set(roots)
    while more := {pid for pid, parent in parents.items() if parent in family and pid not in family}:
        family |= more
    return sorted(family)


def _kill(pid: int, started: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            # The handle pins a process; only then is it asked whether this is the one that was meant.
            if start_time(pid) == started:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _watch(lines: IO[str]) -> None:
    """Until the pipe closes: one line ``pid start_time`` for each process to watch."""
    watched: dict[int, int] = {}
    for line in lines:
        words = line.split()
        if words == [FAREWELL]:
            return
        watched[int(words[0])] = int(words[1])
    roots = {pid for pid, started in watched.items() if start_time(pid) == started}
    # Twice, in case one of them was just starting another.
    for _ in range(2):
        family = [(pid, start_time(pid)) for pid in _with_descendants(roots)]
        for pid, started in family:
            if started is not None:
                _kill(pid, started)


_guardians: weakref.WeakSet[Guardian] = weakref.WeakSet()


class Guardian:
    """Ends the processes it watches when this process ends in any way but :meth:`close`.

    Made, it has started its process. Raises ``OSError`` when that cannot be done.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(  # noqa: S603
            # -I -S: no site-packages and no environment, for a quick start.
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C, or the end of our terminal, must not end it first
            text=True,
        )
        _guardians.add(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, pid: int) -> None:
        """Kill ``pid`` and its descendants when we are gone. A process that has ended is not watched."""
        started = start_time(pid)
        if started is not None:
            self._tell(f"{pid} {started}")

    def close(self) -> None:
        """Let go of all processes, and end the guardian. Safe to call twice."""
        with self._lock:
            pipe = self._process.stdin
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.write(f"{FAREWELL}\n")
                    pipe.flush()
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        with self._lock:
            pipe = self._process.stdin
            # A guardian that somebody killed cannot be told; the engine must not fail for it.
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.write(f"{line}\n")
                    pipe.flush()

    def _let_go(self) -> None:
        pipe = self._process.stdin
        if pipe is not None and not pipe.closed:
            # Put another file in its place: a number that is merely closed would be closed again, as somebody else's.
            nothing = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(nothing, pipe.fileno(), inheritable=False)
            os.close(nothing)


def _forget_all_in_child() -> None:
    # A forked copy of us must not hold the pipe open; the parent alone decides when it closes.
    for guardian in list(_guardians):
        guardian._let_go()
    _guardians.clear()


os.register_at_fork(after_in_child=_forget_all_in_child)


if __name__ == "__main__":
    _watch(sys.stdin)
