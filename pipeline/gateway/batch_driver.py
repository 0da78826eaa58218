"""Threads of a gateway that take batches through their states, so that one needs neither beat nor a free worker."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.batches.drive import drive
from pipeline.process.runtime import Runtime
from pipeline.worker.polling import Poller

_LONGEST_SECONDS = 1.0
_DRIVERS = 2
"""One may read a long file; the other goes on meanwhile."""


class BatchDriver:
    """``planned`` is called after batches have moved: their jobs may wait for somebody to run them."""

    def __init__(self, runtime: Runtime, planned: Callable[[], object]) -> None:
        self._runtime, self._planned = runtime, planned
        self._stopped = False
        self._drivers = Poller("batches", self._drive, count=_DRIVERS, longest=_LONGEST_SECONDS)

    def start(self) -> None:
        self._drivers.start()

    def wake(self) -> None:
        """A batch was created or cancelled: look at once."""
        self._drivers.wake()

    def stop(self) -> None:
        """Begin no further batch, and wait for those that are being written."""
        self._stopped = True
        self._drivers.stop()
        self._drivers.join()

    def _drive(self) -> bool:
        moved = drive(self._runtime, stopped=lambda: self._stopped)
        if moved:
            self._planned()
        return moved
