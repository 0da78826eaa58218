"""A process with all that it started: its processor seconds (wall seconds lengthen on a busy machine), and its end."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import NoReturn

import psutil

EVERY = 0.1
"""Seconds between two notes of a :class:`Clock`."""


def tree_seconds(pid: int) -> float:
    """User and system seconds of process ``pid`` and its descendants, those included that have ended."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                total += used.user + used.system + used.children_user + used.children_system
    return total


def end_tree() -> NoReturn:
    """End this process at once and all that it started: threads and engines that would go on for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(0)


class Clock:
    """Notes the processor seconds of this process tree, for whoever learns only later when the work began.

    Counted process by process, since Ray's workers take theirs with them when they end.
    """

    def __init__(self) -> None:
        self._used: dict[psutil.Process, float] = {}
        self._noted: list[tuple[float, float]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._go_on, daemon=True).start()

    def _go_on(self) -> None:
        while True:
            self._note()
            time.sleep(EVERY)

    def _note(self) -> float:
        with self._lock:
            own = psutil.Process()
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    used = process.cpu_times()
                    self._used[process] = used.user + used.system
            total = sum(self._used.values())
            self._noted.append((time.time(), total))
            return total

    def since(self, moment: float) -> float:
        """Processor seconds from ``moment``, by ``time.time``, until now."""
        return self._note() - next((used for at, used in reversed(self._noted) if at <= moment), 0.0)
