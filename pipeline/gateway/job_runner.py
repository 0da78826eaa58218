"""``serve --embedded``: runs the jobs that nobody runs, some at a time, in threads of this process."""

from __future__ import annotations

import threading
import time

from pipeline.client.session import Background, Session
from pipeline.worker import maintenance
from storage.errors import Conflict, IllegalTransition, Interrupted, RowmillError, TransientError
from storage.fleet import job_lookup
from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)

MOST_JOBS = 4
"""Jobs that run at the same time. They share the engines, which the setting ``max_engines`` bounds."""
_LOOK_SECONDS = 0.5
_PAUSE_SECONDS = 5.0
"""How long a job rests whose run ended with an error, or that another process runs."""


class JobRunner(threading.Thread):
    """Ticks like beat, and starts live jobs: by priority, then the oldest first. Also those an earlier process left."""

    def __init__(self, session: Session) -> None:
        super().__init__(name="rowmill-gateway-jobs", daemon=True)
        self._session = session
        self._stopping, self._awake = threading.Event(), threading.Event()
        self._running: dict[str, Background] = {}
        self._rests_until: dict[str, float] = {}

    def wake(self) -> None:
        """There is a new job: look at once."""
        self._awake.set()

    def stop(self) -> None:
        """Start nothing more, and wait until the thread has ended. The session ends the jobs that run."""
        self._stopping.set()
        self._awake.set()
        self.join()

    def run(self) -> None:
        """Until :meth:`stop`; an error is logged, and the next look tries again."""
        tick_at = time.monotonic()
        while not self._stopping.is_set():
            self._awake.clear()
            try:
                if time.monotonic() >= tick_at:
                    tick_at = time.monotonic() + self._session.runtime.settings.tick_seconds
                    maintenance.run_maintenance(self._session.runtime)
                self._look()
            except Exception as error:
                text = "looking for jobs failed, the next round tries again"
                log.failure(text, error, action=Action.RUNNER_POSTPONED)
            self._awake.wait(_LOOK_SECONDS)

    def _look(self) -> None:
        self._collect()
        now = time.monotonic()
        self._rests_until = {job_id: until for job_id, until in self._rests_until.items() if until > now}
        busy = [*self._running, *self._rests_until]
        for job_id in job_lookup.live(self._session.runtime.database, without=busy, limit=MOST_JOBS):
            if self._stopping.is_set() or len(self._running) >= MOST_JOBS:
                return
            started = self._session.start(job_id)
            if started is None:
                self._rests_until[job_id] = now + _PAUSE_SECONDS  # another process runs it
            else:
                self._running[job_id] = started

    def _collect(self) -> None:
        for job_id, background in list(self._running.items()):
            if not background.done.is_set():
                continue
            del self._running[job_id]
            error = background.error
            if error is None:
                continue
            self._rests_until[job_id] = time.monotonic() + _PAUSE_SECONDS
            if isinstance(error, (Conflict, IllegalTransition, Interrupted)):
                continue  # another process runs it, or this one is ending
            if isinstance(error, RowmillError) and not isinstance(error, TransientError):
                log.warning("job %s: %s", job_id, error, action=Action.JOB_POSTPONED, job_id=job_id)
            else:
                log.error(
                    "job %s ended with an error, and is tried again",
                    job_id,
                    exc_info=error,
                    action=Action.JOB_POSTPONED,
                    job_id=job_id,
                )
