"""A process of its own for the ``control`` queue, beside a worker whose threads are busy with shards for hours.

Planning, publishing and the tick must not wait for a shard to end, and must not take the time of the threads that feed
an engine (docs/adr/0012).
"""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress

from pipeline.host.child_reaper import Guardian
from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)

STOP_SECONDS = 10.0
"""How much longer than the grace it may take to end, before it is killed."""
_LONGEST_PAUSE_SECONDS = 30.0


class ControlProcess:
    """Started when made; started again when it ends by itself with an error, ever less often. :meth:`stop` ends it.

    It ends when this process does, however that ends. One that was drained (exit code 0) stays away.
    """

    def __init__(self) -> None:
        self._guardian = Guardian()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep, name="rowmill-control", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self, timeout: float) -> None:
        """End it politely; kill it after ``timeout`` seconds. Nothing it does is lost: what it began is begun again."""
        with self._lock:
            self._stopping.set()
            self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()
        self._guardian.close()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tasks.worker", "--queues", "control", "--slots", "0"]
        # In a session of its own: Ctrl-C at the terminal is for us, who then tell it.
        process = subprocess.Popen(command, start_new_session=True)  # noqa: S603
        self._guardian.watch(process.pid)
        return process

    def _keep(self) -> None:
        pause = 1.0
        while True:
            code = self._process.wait()
            if self._stopping.is_set():
                return
            if code == 0:
                log.warning(
                    "the control process was drained; planning and publishing are left to other workers",
                    action=Action.CONTROL_DRAINED,
                )
                return
            log.error(
                "the control process ended with %d; it is started again in %.0f s",
                code,
                pause,
                action=Action.CONTROL_RESTARTED,
            )
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            with self._lock, suppress(OSError):
                if not self._stopping.is_set():
                    self._process = self._start()
