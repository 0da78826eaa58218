"""What a client and the handles of its jobs share: the open database, and the jobs that run in this process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.process import process_end
from pipeline.process.heartbeat import INTERRUPTED
from pipeline.process.runtime import Runtime, start
from pipeline.spec.status import JobStatus
from pipeline.worker import embedded, maintenance
from storage.broker import Wakeups
from storage.errors import Interrupted, RowmillError
from storage.fleet import workers
from storage.log_actions import Action
from storage.logs import get_logger
from storage.queue import jobs
from storage.records import Job

log = get_logger(__name__)

_of_the_parent: list[Runtime] = []
"""Never closed, nor collected: the connections in them are the parent process's."""


class Background(threading.Thread):
    """A job that runs in a thread of this process. ``error`` is how it ended, where it did not end as a job does."""

    def __init__(self, runtime: Runtime, job_id: str, ended: Callable[[], None]) -> None:
        super().__init__(name=f"rowmill-job-{job_id[:8]}", daemon=True)
        self._runtime, self._job_id, self._ended = runtime, job_id, ended
        self.interrupt = Cancellation()
        # Not ``join``: Ctrl-C in the midst of one makes Python 3.11 believe that the thread has ended.
        self.done = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run the job to its end, or until it is interrupted."""
        try:
            job = jobs.get(self._runtime.database, self._job_id)
            embedded.run_job(self._runtime, job, interrupt=self.interrupt)
        except BaseException as error:
            self.error = error
            if isinstance(error, Interrupted) and process_end.ending.is_set():
                log.warning(
                    "job %s was interrupted, because its process ended; everything finished is flushed. To go on: "
                    "client.job(%r).wait(), or 'rowmill job resume %s'",
                    *(self._job_id,) * 3,
                    action=Action.JOB_INTERRUPTED,
                    job_id=self._job_id,
                )
        finally:
            self.done.set()
            self._ended()


class Foreground:
    """A job that runs in the thread that asked for it. Its process may end from elsewhere meanwhile: by a signal."""

    def __init__(self, interrupt: Cancellation) -> None:
        self._interrupt = interrupt
        self.done = threading.Event()

    def stop(self) -> None:
        """Let it flush and hand back its shards. Returns at once."""
        self._interrupt.cancel(INTERRUPTED)

    def close(self) -> None:
        """The same, and wait for it."""
        self.stop()
        self.done.wait()


class Session:
    """Opened with the client. It stays open while a job runs in it, whoever has forgotten the client meanwhile.

    In a forked child it opens anew: the parent's connections, engines and jobs stay the parent's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.RLock()
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._notices = _Notices()
        self._runtime = start(self._settings, self._notices)
        self._wakeups = Wakeups(self._settings.broker_url)
        self._running: dict[str, Background] = {}
        self._closed = False
        if self._settings.broker_url is None:
            process_end.watch()  # now: jobs may be started in another thread, which cannot
        # Of a session that nobody has closed: with the last handle, or when the interpreter ends.
        self._finalizer = weakref.finalize(self, _close, self._runtime, self._pid)

    @property
    def runtime(self) -> Runtime:
        """Raises :class:`RowmillError` once the session is closed."""
        if self._pid != os.getpid():
            _of_the_parent.append(self._runtime)
            self._lock = threading.RLock()  # another thread of the parent may hold the old one, for ever
            self._open()
        if self._closed:
            raise RowmillError("the client is closed; make a new one")
        return self._runtime

    @property
    def wakeups(self) -> Wakeups:
        """Where other processes are told of work."""
        self.runtime  # noqa: B018 - raises when closed
        return self._wakeups

    def notify(self, on_notice: Callable[[str], None] | None) -> None:
        """Hand what is worth a line to ``on_notice`` from now on, unless it is ``None``."""
        self.runtime  # noqa: B018 - raises when closed
        if on_notice is not None:
            self._notices.to = on_notice

    def start(self, job_id: str) -> Background | None:
        """Run the job in the background, if it is this process's to run."""
        runtime = self.runtime
        running = self._running.get(job_id)
        if running is not None and not running.done.is_set():
            return running
        if runtime.settings.broker_url is not None:
            return None
        maintenance.recover_local(runtime)
        if workers.holders(runtime.database, job_id):
            return None
        with self._lock:
            if self._closed or process_end.ending.is_set():
                raise Interrupted(f"job {job_id} was not started: its process is ending")
            # A server that runs for months starts many.
            self._running = {key: item for key, item in self._running.items() if not item.done.is_set()}
            background = self._running[job_id] = Background(runtime, job_id, self._ended)
            process_end.add(self)
            background.start()
        return background

    def run(
        self, job: Job, interrupt: Cancellation | None, on_progress: Callable[[JobStatus], None] | None
    ) -> JobStatus:
        """Run the job here and now; see :func:`pipeline.worker.embedded.run_job`."""
        runtime = self.runtime
        interrupt = interrupt or Cancellation()
        work = Foreground(interrupt)
        process_end.add(work)
        try:
            return embedded.run_job(runtime, job, interrupt=interrupt, on_progress=on_progress or (lambda status: None))
        except Interrupted:
            work.done.set()
            process_end.await_signal()
            raise
        finally:
            work.done.set()
            process_end.discard(work)

    def _ended(self) -> None:
        with self._lock:
            if all(background.done.is_set() for background in self._running.values()):
                process_end.discard(self)

    def stop(self) -> None:
        """Let the jobs of this process flush and hand back their shards. Returns at once."""
        for background in list(self._running.values()):
            background.interrupt.cancel(INTERRUPTED)

    def close(self) -> None:
        """Flush and hand back what runs in the background, end the engines, close the database. Safe to call twice."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
        self.stop()
        for background in list(self._running.values()):
            background.done.wait()
        self._running.clear()
        process_end.discard(self)
        self._finalizer()


class _Notices:
    """Where notices go; known to the runtime, which must not hold the session itself."""

    def __init__(self) -> None:
        self.to: Callable[[str], None] = lambda message: None

    def __call__(self, message: str) -> None:
        self.to(message)


def _close(runtime: Runtime, pid: int) -> None:
    if pid == os.getpid():
        runtime.close()
