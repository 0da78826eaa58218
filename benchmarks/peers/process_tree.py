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
    """Notes the processor seconds of this process tree, for whoever learns only later when the work began."""

    def __init__(self) -> None:
        self._noted: list[tuple[float, float]] = []
        threading.Thread(target=self._note, daemon=True).start()

    def _note(self) -> None:
        while True:
            self._noted.append((time.time(), tree_seconds(os.getpid())))
            time.sleep(EVERY)

    def since(self, moment: float) -> float:
        """Processor seconds from ``moment``, by ``time.time``, until now."""
        return tree_seconds(os.getpid()) - next(used for at, used in reversed(self._noted) if at <= moment)
