"""What a worker process does when it is woken: plan, run a shard, publish, tidy up. Celery's tasks call only this.

One per process. Wake-ups are hints: each call asks the database what there is to do, and does nothing when that is
nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from contextlib import suppress

from pipeline import maintenance, planner
from pipeline.engines.base import Cancellation
from pipeline.finalize import finalize_job
from pipeline.gate import Gate
from pipeline.leases import WATCH_SECONDS, LeaseKeeper
from pipeline.runtime import Runtime, start
from pipeline.settings import Settings
from pipeline.shard import execute
from pipeline.unfit import Unfit
from storage import claims, jobs, reports, ticks, workers
from storage.errors import CommitUnknown, RowmillError, TransientError
from storage.wakeups import CONTROL_QUEUE, Wakeups

log = logging.getLogger(__name__)

DRAINING = "the worker is draining"
PLANNERS = 2
PUBLISHERS = 2
"""How many of a process's threads plan, and publish, at most: a long conversion or copy leaves the others free."""
HEARTBEAT_SECONDS = 10.0
"""A third of the lease at most. A drain that somebody asks for is noticed this late; a cancel sooner (``leases``)."""


class Worker:
    """Started once per process, after any fork. To end it: ``drain``, wait for its calls to return, ``close``.

    ``queues`` and ``slots`` are what it says of itself in the database. ``on_drain`` is called once, from a thread of
    its own, when somebody asks there for it to drain; by default it does so with the grace that the settings give.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        engines: Collection[str] = (),
        queues: Collection[str] = (CONTROL_QUEUE,),
        slots: int = 0,
        on_drain: Callable[[], object] | None = None,
    ) -> None:
        self.runtime: Runtime = start(settings, log.info, engines=engines, queues=queues, slots=slots)
        self.wakeups = Wakeups(settings.broker_url)
        self._on_drain = on_drain or self.drain
        self._draining = threading.Event()
        self._asked_to_drain = False
        self._flush = Cancellation()
        self._unfit = Unfit()
        self._planning, self._publishing, self._ticking = Gate(PLANNERS), Gate(PUBLISHERS), Gate(1)
        self._keeper = LeaseKeeper(
            self.runtime.database,
            worker_id=self.runtime.worker.id,
            lease_seconds=settings.lease_seconds,
            heartbeat_seconds=min(HEARTBEAT_SECONDS, settings.lease_seconds / 3),
            alive=self._alive,
            watch_seconds=WATCH_SECONDS,
        )
        self.runtime.register()
        self._keeper.__enter__()

    def plan(self) -> None:
        """Plan every job that waits for it, and wake workers for its shards."""
        self._planning.run(self._plan)

    def _plan(self) -> None:
        database = self.runtime.database
        for planned in planner.plan_waiting(self.runtime, self._draining.is_set, self._flush):
            if planned.n_open:
                self.wakeups.run(planned.queue, min(planned.n_open, workers.free_slots(database, planned.queue)))
            else:
                self.wakeups.finalize()

    def run(self, queue: str) -> None:
        """Claim one shard of ``queue`` and take it to the end of its attempt; then wake whoever comes next."""
        if self._draining.is_set() or self._unfit.held_back(queue):
            return
        database, settings = self.runtime.database, self.runtime.settings
        claim = claims.claim(
            database,
            owner=self.runtime.worker.id,
            lease_seconds=settings.lease_seconds,
            queues=[queue],
            warm=self.runtime.engines.warm_keys(),
            keep=self.runtime.engines.unpaid_keys(),
        )
        if claim is None:
            return
        self._unfit.note(queue, execute(self.runtime, claim, self._keeper, self._flush, others=True))
        if jobs.get(database, claim.job.id).n_open == 0:
            self.wakeups.finalize()
        self.wakeups.run(queue)

    def finalize(self) -> None:
        """Publish every job whose shards have all ended."""
        self._publishing.run(self._finalize)

    def _finalize(self) -> None:
        while not self._draining.is_set():
            try:
                if finalize_job(self.runtime) is None:
                    return
            except RowmillError as error:
                log.warning("a job could not be published, the next tick tries again: %s", error)
                return

    def tick(self) -> None:
        """Maintenance, and a wake-up for everything that waits: lost messages are made good here.

        Nothing, when a round began less than half of ``tick_seconds`` ago, here or elsewhere: beats may be several,
        and wake-ups that nobody took pile up.
        """
        self._ticking.run(self._tick)

    def _tick(self) -> None:
        runtime, apart = self.runtime, maintenance.apart
        if not ticks.take(runtime.database, every=runtime.settings.tick_seconds / 2):
            return
        maintenance.urgent(runtime)
        apart(workers.forget_silent, runtime.database)
        apart(self.wake)
        apart(self.wakeups.plan)
        apart(self.wakeups.finalize)
        maintenance.clean(runtime)

    def wake(self, queues: Collection[str] | None = None) -> None:
        """Wake workers for the shards that are ready, on all queues or on some: no more than they have free slots."""
        database = self.runtime.database
        for queue, count in reports.ready_shards(database).items():
            if queues is None or queue in queues:
                self.wakeups.run(queue, min(count, workers.free_slots(database, queue)))

    def drain(self, grace: float | None = None) -> None:
        """Claim nothing more. Running shards may go on for ``grace`` seconds (by default what the settings say).

        Those that are not done then are flushed and handed back, each in the thread that runs it.
        """
        self._draining.set()
        if grace is None:
            grace = self.runtime.settings.drain_grace_seconds
        if grace > 0:
            timer = threading.Timer(grace, self.flush)
            timer.daemon = True
            timer.start()
        else:
            self.flush()

    def flush(self) -> None:
        """The grace is over: what is finished is flushed, and the shards are handed back."""
        self._draining.set()
        self._flush.cancel(DRAINING)

    def close(self) -> None:
        """End the engines and the connections. Once nothing runs here any more: see :meth:`drain`."""
        self.flush()
        self._keeper.__exit__(None, None, None)
        with suppress(TransientError, CommitUnknown):
            workers.unregister(self.runtime.database, self.runtime.worker.id)
        self.runtime.close()

    def _alive(self) -> None:
        runtime, draining = self.runtime, self._draining.is_set()
        asked = workers.touch(runtime.database, runtime.worker.id, draining=draining, warm=runtime.engines.warm())
        if asked is None:
            runtime.register()  # struck off after a long silence: it lives
        elif asked and not draining and not self._asked_to_drain:
            self._asked_to_drain = True
            log.warning("somebody asked this worker to drain")
            threading.Thread(target=self._on_drain, name="rowmill-asked-to-drain", daemon=True).start()
