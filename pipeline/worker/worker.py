"""What a worker process does: plan, run shards, publish, tidy up. One per process.

Its threads ask the database for work by themselves (docs/adr/0031). A wake-up is a hint to ask now rather than in a few
seconds: Celery's tasks call :meth:`Worker.wake_up` and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from pipeline.batches.drive import drive
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.execution.attempt import attempt_ids, execute
from pipeline.jobs import plan_queue
from pipeline.output.finalize import claim_job, publish_claimed
from pipeline.process.heartbeat import WATCH_SECONDS, LeaseKeeper
from pipeline.process.runtime import Runtime, start
from pipeline.worker import maintenance
from pipeline.worker.circuit_breaker import CircuitBreaker
from pipeline.worker.polling import Poller
from storage.broker import CONTROL_QUEUE, FINALIZE, PLAN, RUN, TICK, Wakeups
from storage.errors import CommitUnknown, TransientError
from storage.fleet import maintenance_lock, reports, workers
from storage.log_actions import Action
from storage.logs import bound, get_logger
from storage.queue import claims, jobs
from storage.records import Claim

log = get_logger(__name__)


def _notify(text: str) -> None:
    log.info("%s", text, action=Action.RUNTIME_NOTICE)


DRAINING = "the worker is draining"
PLANNERS = 2
FINALIZERS = 2
DRIVERS = 2
"""How many of a process's threads plan, publish, and drive batches, at most: a long conversion or copy leaves the
others free."""
_BATCHES = "batches"
HEARTBEAT_SECONDS = 10.0
"""A third of the lease at most. A drain that somebody asks for is noticed this late; a cancel sooner (``leases``)."""


class Worker:
    """Made once per process, after any fork. :meth:`start` has it look for work. To end it: ``drain``, then ``close``.

    It takes shards from ``queues``, ``slots`` at a time, and does control work if ``control`` is among the queues.
    ``on_drain`` is called once, from a thread of its own, when somebody asks in the database for it to drain; by
    default it does so with the grace that the settings give.
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
        self.runtime: Runtime = start(settings, _notify, engines=engines, queues=queues, slots=slots)
        self.wakeups = Wakeups(settings.broker_url)
        self._on_drain = on_drain or self.drain
        self._draining = threading.Event()
        self._asked_to_drain = False
        self._flush = Cancellation()
        self._breaker = CircuitBreaker()
        self._keeper = LeaseKeeper(
            self.runtime.database,
            worker_id=self.runtime.worker.id,
            lease_seconds=settings.lease_seconds,
            heartbeat_seconds=min(HEARTBEAT_SECONDS, settings.lease_seconds / 3),
            alive=self._alive,
            watch_seconds=WATCH_SECONDS,
        )
        self._pollers = self._make_pollers(queues, slots)
        self._tick_asked = False
        self._dropped = 0
        self.runtime.register()
        self._keeper.__enter__()

    def _make_pollers(self, queues: Collection[str], slots: int) -> dict[str, Poller]:
        """Those who look for work, by the name of the wake-up that makes them look at once."""
        settings, pollers = self.runtime.settings, {}
        if slots:
            of_shards = [queue for queue in queues if queue != CONTROL_QUEUE]
            pollers[RUN] = Poller("shard", lambda: self.run(*of_shards), count=slots, longest=settings.poll_seconds)
        if CONTROL_QUEUE in queues:
            pollers[PLAN] = Poller("planning", self.plan, count=PLANNERS, longest=settings.poll_seconds)
            pollers[FINALIZE] = Poller("publishing", self.finalize, count=FINALIZERS, longest=settings.poll_seconds)
            pollers[_BATCHES] = Poller("batches", self._drive_batches, count=DRIVERS, longest=settings.poll_seconds)
            every = settings.tick_seconds
            pollers[TICK] = Poller("tick", self._tick_when_due, count=1, first=every, longest=every)
        return pollers

    def start(self) -> None:
        """Look for work from now on, until :meth:`drain`."""
        for poller in self._pollers.values():
            poller.start()

    def wake_up(self, name: str) -> None:
        """A message came that says ``name`` (``storage.broker``): look now."""
        if name == TICK:
            self._tick_asked = True
        for poller in (name, _BATCHES) if name in (PLAN, FINALIZE) else (name,):
            if poller in self._pollers:
                self._pollers[poller].wake()

    @property
    def takes_messages(self) -> bool:
        """Whether a wake-up is of use here: while all slots are busy, it is better left to another worker."""
        return set(self._pollers) != {RUN} or self._pollers[RUN].free > 0

    def drop_message(self, reason: str) -> None:
        """Count a message that makes no sense, and say so in one line."""
        self._dropped += 1
        log.warning(
            "a message was dropped, %d since this worker began: %s",
            self._dropped,
            reason,
            action=Action.MESSAGE_DROPPED,
        )

    def plan(self) -> bool:
        """Plan every job that waits for it, and wake workers for its shards. Returns whether there was one."""
        database, found = self.runtime.database, False
        for planned in plan_queue.plan_waiting(self.runtime, self._draining.is_set, self._flush):
            found = True
            if planned.n_open:
                self.wakeups.run(planned.queue, min(planned.n_open, workers.free_slots(database, planned.queue)))
                self.wake_up(RUN)
            else:
                self.wakeups.finalize()
                self.wake_up(FINALIZE)
        return found

    def _drive_batches(self) -> bool:
        moved = drive(self.runtime, stopped=self._draining.is_set)
        if moved:
            self.wakeups.plan()
            self._pollers[PLAN].wake()
        return moved

    def run(self, *queues: str) -> bool:
        """Claim one shard of ``queues`` and take it to the end of its attempt. Returns whether there was one."""
        database, settings = self.runtime.database, self.runtime.settings
        takes_from = [queue for queue in queues if not self._breaker.is_open(queue)]
        if self._draining.is_set() or not takes_from:
            return False
        claim = claims.claim(
            database,
            owner=self.runtime.worker.id,
            lease_seconds=settings.lease_seconds,
            queues=takes_from,
            warm=self.runtime.engines.warm_keys(),
            sticky_keys=self.runtime.engines.sticky_keys(),
        )
        if claim is None:
            return False
        self.wake_up(RUN)  # where there was one, there may be more
        self._execute(claim)
        if jobs.get(database, claim.job.id).n_open == 0:
            self.wakeups.finalize()
            self.wake_up(FINALIZE)
        return True

    def _execute(self, claim: Claim) -> None:
        shard, job = claim.shard, claim.job
        what = f"job {job.id} of tenant {job.tenant}: shard {shard.idx}, attempt {claim.attempt_no}"
        ids = attempt_ids(self.runtime, claim)
        log.info("%s begins: %d rows to compute", what, len(claim.todo), action=Action.SHARD_CLAIMED, **ids)
        began = time.monotonic()
        fit = execute(self.runtime, claim, self._keeper, self._flush, others=True)
        self._breaker.record(job.queue, fit)
        seconds = time.monotonic() - began
        if log.isEnabledFor(logging.INFO):
            with suppress(TransientError):
                ended = reports.attempt(self.runtime.database, shard.id, claim.attempt_no)
                why = f": {ended.error}" if ended.error else ""
                text = f"{what} {ended.state}: {ended.rows_computed} rows computed in {seconds:.1f} s{why}"
                log.info("%s", text, action=Action.ATTEMPT_ENDED, **ids)

    def finalize(self) -> bool:
        """Publish every job whose shards have all ended. Returns whether there was one."""
        found = False
        while not self._draining.is_set() and (job := claim_job(self.runtime)) is not None:
            with bound(tenant=job.tenant, job_id=job.id, worker=self.runtime.worker.id):
                try:
                    job = publish_claimed(self.runtime, job)
                except Exception as error:
                    text = f"job {job.id} could not be published, trying again soon"
                    log.failure(text, error, action=Action.JOB_PUBLISHING_POSTPONED)
                    return False
                found = True
                text = "job %s of tenant %s %s: %d rows"
                log.info(text, job.id, job.tenant, job.state, job.rows_done, action=Action.JOB_PUBLISHED)
        return found

    def _tick_when_due(self) -> bool:
        """Asked for by beat; or, since that message may not come, by itself when a round is overdue."""
        asked, self._tick_asked = self._tick_asked, False
        self.tick(overdue=not asked)
        return False

    def tick(self, *, overdue: bool = False) -> None:
        """Maintenance, and a wake-up for everything that waits: lost messages are made good here.

        Nothing happens when a round began less than half of ``tick_seconds`` ago, in any process: several beats may
        run, and messages that nobody took pile up. With ``overdue``, less than ``tick_seconds`` ago.
        """
        runtime = self.runtime
        if not maintenance_lock.take(runtime.database, every=runtime.settings.tick_seconds / (1 if overdue else 2)):
            return
        maintenance.run_maintenance(runtime, gc=False)
        maintenance.run_step(workers.forget_silent, runtime.database)
        for step in (self.wake, self.wakeups.plan, self.wakeups.finalize):
            maintenance.run_step(step)
        maintenance.run_gc(runtime)

    def wake(self, queues: Collection[str] | None = None) -> None:
        """Wake workers for the shards that are ready, on all queues or on some: as many as they have free slots."""
        database = self.runtime.database
        for queue, count in reports.ready_shards(database).items():
            if queues is None or queue in queues:
                self.wakeups.run(queue, min(count, workers.free_slots(database, queue)))

    def drain(self, grace: float | None = None) -> None:
        """Claim nothing more. Running shards may go on for ``grace`` seconds (by default what the settings say).

        Those that are not done then are flushed and handed back, each in the thread that runs it.
        """
        self._stop_looking()
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
        self._stop_looking()
        self._flush.cancel(DRAINING)

    def _stop_looking(self) -> None:
        self._draining.set()
        for poller in self._pollers.values():
            poller.stop()

    def close(self) -> None:
        """Wait until everything that runs here has ended, then end the engines and the connections.

        After :meth:`drain` it waits for the shards to finish within the grace; without it they are flushed at once.
        """
        if not self._draining.is_set():
            self.flush()
        for poller in self._pollers.values():
            poller.join()
        self.flush()
        self._keeper.__exit__(None, None, None)
        with suppress(TransientError, CommitUnknown):
            workers.unregister(self.runtime.database, self.runtime.worker.id)
        self.runtime.close()

    def _alive(self) -> None:
        runtime, draining = self.runtime, self._draining.is_set()
        asked = workers.touch(
            runtime.database,
            runtime.worker.id,
            draining=draining,
            warm=runtime.engines.warm(),
            trouble=self._trouble(),
            dropped_messages=self._dropped,
        )
        if asked is None:
            runtime.register()  # struck off after a long silence: it lives
        elif asked and not draining and not self._asked_to_drain:
            self._asked_to_drain = True
            log.warning("somebody asked this worker to drain", action=Action.WORKER_DRAIN_REQUESTED)
            threading.Thread(target=self._on_drain, name="rowmill-asked-to-drain", daemon=True).start()

    def _trouble(self) -> str | None:
        """Why this worker gets no work although it is alive and not draining."""
        found = (poller.trouble for poller in self._pollers.values())
        return "; ".join(dict.fromkeys(text for text in found if text)) or None
