"""What a worker process does when it is woken: plan, run a shard, publish, tidy up. Celery's tasks call only this.

One per process. Wake-ups are hints: each call asks the database what there is to do, and does nothing when that is
nothing.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from pipeline import maintenance
from pipeline.engines.base import Cancellation
from pipeline.finalize import finalize_job
from pipeline.job import plan_job
from pipeline.leases import LeaseKeeper
from pipeline.runtime import Runtime, start
from pipeline.settings import Settings
from pipeline.shard import execute
from storage import claims, jobs, reports, workers
from storage.errors import IllegalTransition, InvalidJob, RowmillError, TransientError
from storage.states import JobState
from storage.wakeups import Wakeups

log = logging.getLogger(__name__)

DRAINING = "the worker is draining"


class Worker:
    """Started once per process, after any fork. To end it: ``drain``, wait for its calls to return, ``close``."""

    def __init__(self, settings: Settings) -> None:
        self.runtime: Runtime = start(settings, log.info)
        self.wakeups = Wakeups(settings.broker_url)
        self._drain = Cancellation()
        self._keeper = LeaseKeeper(
            self.runtime.database, worker_id=self.runtime.worker.id, lease_seconds=settings.lease_seconds
        )
        self.runtime.register()
        self._keeper.__enter__()

    def plan(self) -> None:
        """Plan every job that waits for it, and wake workers for its shards."""
        database = self.runtime.database
        for job in jobs.listed(database, state=JobState.VALIDATING, limit=100):
            try:
                planned = plan_job(self.runtime, job)
            except InvalidJob as error:
                log.warning("job %s was refused: %s", job.id, error)
                continue
            except IllegalTransition:
                continue  # another worker planned it, or it was cancelled
            if planned.n_open:
                self.wakeups.run(planned.queue, min(planned.n_open, reports.slots(database)))
            else:
                self.wakeups.finalize()

    def run(self, queue: str) -> None:
        """Claim one shard of ``queue`` and take it to the end of its attempt; then wake whoever comes next."""
        if self._drain.cancelled:
            return
        database, settings = self.runtime.database, self.runtime.settings
        claim = claims.claim(
            database,
            owner=self.runtime.worker.id,
            lease_seconds=settings.lease_seconds,
            queues=[queue],
            warm=self.runtime.engines.warm_keys(),
        )
        if claim is None:
            return
        execute(self.runtime, claim, self._keeper, self._drain)
        if jobs.get(database, claim.job.id).n_open == 0:
            self.wakeups.finalize()
        self.wakeups.run(queue)

    def finalize(self) -> None:
        """Publish every job whose shards have all ended."""
        while True:
            try:
                if finalize_job(self.runtime) is None:
                    return
            except RowmillError as error:
                log.warning("a job could not be published, the next tick tries again: %s", error)
                return

    def tick(self) -> None:
        """Maintenance, and a wake-up for everything that waits: lost messages are made good here."""
        maintenance.tick(self.runtime)
        database = self.runtime.database
        for queue, ready in reports.ready_shards(database).items():
            self.wakeups.run(queue, min(ready, reports.slots(database)))
        self.wakeups.plan()
        self.wakeups.finalize()

    def drain(self) -> None:
        """Claim nothing more; running shards flush and are handed back, each in the thread that runs it."""
        self._drain.cancel(DRAINING)

    def close(self) -> None:
        """End the engines and the connections. Once nothing runs here any more: see :meth:`drain`."""
        self.drain()
        self._keeper.__exit__(None, None, None)
        with suppress(TransientError):
            workers.unregister(self.runtime.database, self.runtime.worker.id)
        self.runtime.close()
