"""The embedded mode: one process plans, claims, runs and publishes a job, through the same calls as a worker does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.engines import registry
from pipeline.engines.base import Cancellation
from pipeline.execution.attempt import execute
from pipeline.jobs.plan import plan_job
from pipeline.jobs.status_query import job_status
from pipeline.output.finalize import finalize_job
from pipeline.process.attendance import attending
from pipeline.process.heartbeat import INTERRUPTED, JOB_STOPPING, LeaseKeeper
from pipeline.process.runtime import Runtime
from pipeline.spec.status import JobStatus
from pipeline.worker import maintenance
from storage.errors import Conflict, IllegalTransition, Interrupted, LeaseLost
from storage.fleet import workers
from storage.fleet.workers import Holder
from storage.logs import bound
from storage.queue import claims, jobs
from storage.records import Job
from storage.states import TERMINAL_JOB, JobState

HEARTBEAT_SECONDS = 5.0
"""Short enough that ``rowmill job cancel`` from another terminal is felt at once; a third of the lease at most."""
PROGRESS_SECONDS, _SLOW_PROGRESS_SECONDS = 0.25, 1.0
_PROGRESS_SHARE = 0.005
"""Most of a processor that looking at the progress takes: where a look takes long, there are fewer, down to one each
``_SLOW_PROGRESS_SECONDS``."""
IDLE_SECONDS = 0.5
"""How long a slot without a shard waits before it asks again (a shard in backoff, or held by another process)."""


def run_job(
    runtime: Runtime,
    job: Job,
    *,
    interrupt: Cancellation,
    on_progress: Callable[[JobStatus], None] = lambda status: None,
    tick: Callable[[Runtime], object] = lambda runtime: maintenance.run_maintenance(runtime, schedules=False),
) -> JobStatus:
    """Work on ``job`` until it has ended, in this process; meanwhile ``tick`` is called at every heartbeat.

    Raises :class:`Interrupted` when ``interrupt`` fires: what was finished is flushed by then and the shards are handed
    back. Raises :class:`Conflict` when another process is at work on the job, and :class:`InvalidJob` when planning
    finds the request unusable. A process of another host may be dead; for its lease it is waited.
    """
    _wait_for_others(runtime, job.id, interrupt)
    settings = runtime.settings
    ids = bound(tenant=job.tenant, job_id=job.id, worker=runtime.worker.id)
    with runtime.registered(), attending(runtime, job.id), ids:
        while True:
            told = _Once()
            on_progress(job_status(runtime.database, job))
            while job.state is JobState.VALIDATING:
                job = _planned(runtime, job, interrupt, told)
            on_progress(job_status(runtime.database, job))
            with LeaseKeeper(
                runtime.database,
                worker_id=runtime.worker.id,
                lease_seconds=settings.lease_seconds,
                heartbeat_seconds=min(HEARTBEAT_SECONDS, settings.lease_seconds / 3),
                tick=lambda: tick(runtime),
                alive=runtime.heartbeat,
            ) as keeper:
                status = _work(runtime, job, keeper, interrupt, on_progress)
            if status is not None:
                return status
            job = jobs.get(runtime.database, job.id)


def _wait_for_others(runtime: Runtime, job_id: str, interrupt: Cancellation) -> None:
    """Return when nobody else works on the job.

    Whoever is of this host is alive: the dead have been struck off. Another host's process shows it by renewing its
    lease; one that does not is waited for until the lease runs out.
    """
    maintenance.recover_local(runtime)
    seen: dict[str, float] = {}
    told = _Once()
    while others := workers.holders(runtime.database, job_id):
        for other in others:
            worker, until = other.worker, seen.setdefault(other.worker.id, other.until)
            if worker.host == runtime.worker.host or other.until > until:
                raise Conflict(f"job {job_id} is being worked on by another process ({worker.id}): wait for it with "
                               f"'rowmill job wait {job_id}', or cancel it")  # fmt: skip
        last = max(others, key=lambda other: other.until)
        told.tell(runtime, f"waiting for {_named(last)}: it works on job {job_id}, or it is dead")
        if interrupt.wait(min(IDLE_SECONDS, max(0.0, last.seconds))):
            raise Interrupted(f"job {job_id} was interrupted while it waited for {last.worker.id}")
    if seen:
        maintenance.reap(runtime)


def _named(holder: Holder) -> str:
    until = time.strftime("%H:%M:%S", time.localtime(time.time() + holder.seconds))
    return f"{holder.worker.id}, until {until} unless it renews its lease"


@dataclass(slots=True)
class _Once:
    """Something that the user is told once, however often it is seen."""

    told: bool = False

    def tell(self, runtime: Runtime, message: str) -> None:
        if not self.told:
            self.told = True
            runtime.notify(message)


def _planned(runtime: Runtime, job: Job, interrupt: Cancellation, told: _Once) -> Job:
    """The job after somebody has tried to plan it; it may still be unplanned when another process plans it."""
    try:
        return plan_job(runtime, job, interrupt)
    except LeaseLost:
        _tell_of_others(runtime, job.id, told, "plans it")
        if interrupt.wait(IDLE_SECONDS):
            raise Interrupted(f"job {job.id} was interrupted while another process planned it") from None
    except IllegalTransition:
        pass  # somebody was faster, or it was cancelled meanwhile
    return jobs.get(runtime.database, job.id)


def _work(
    runtime: Runtime,
    job: Job,
    keeper: LeaseKeeper,
    interrupt: Cancellation,
    on_progress: Callable[[JobStatus], None],
) -> JobStatus | None:
    """The job's end; ``None`` when somebody else ended it, and it was retried before that was seen here."""
    job_id = job.id
    settings = runtime.settings
    count = settings.slots
    if "slots" not in settings.model_fields_set:
        count = registry.default_slots(job.engine, otherwise=count)
    ended = threading.Condition()
    slots = [_Slot(runtime, job_id, keeper, interrupt, ended) for _ in range(count)]
    for slot in slots:
        slot.start()
    pause = PROGRESS_SECONDS
    try:
        for slot in slots:
            while not slot.done.wait(pause):
                began = time.thread_time()
                status = job_status(runtime.database, jobs.get(runtime.database, job_id))
                on_progress(with_unflushed(runtime, status))
                if status.state is JobState.CANCELLING:
                    keeper.stop_all(JOB_STOPPING)
                spent = time.thread_time() - began
                pause = min(max(PROGRESS_SECONDS, spent / _PROGRESS_SHARE), _SLOW_PROGRESS_SECONDS)
    except BaseException:
        # Ctrl-C in this thread, or an error of ``on_progress``: the shards are flushed and handed back all the same.
        interrupt.cancel(INTERRUPTED)
        for slot in slots:
            slot.done.wait()
        raise
    for slot in slots:
        if slot.error is not None:
            raise slot.error
    if interrupt.cancelled:
        raise Interrupted(f"job {job_id} was interrupted; everything finished is flushed")
    told = _Once()
    while True:
        on_progress(job_status(runtime.database, jobs.get(runtime.database, job_id)))
        try:
            finalize_job(runtime, job_id)
        except LeaseLost:
            continue  # cancelled while it was being published, or somebody else publishes it: see what there is to do
        job = jobs.get(runtime.database, job_id)
        status = job_status(runtime.database, job)
        if job.state in TERMINAL_JOB:
            on_progress(status)
            return status
        if job.n_open or job.state is JobState.VALIDATING:
            return None
        _tell_of_others(runtime, job_id, told, "publishes it")
        if interrupt.wait(IDLE_SECONDS):
            raise Interrupted(f"job {job_id} was interrupted while it was being published")


def _tell_of_others(runtime: Runtime, job_id: str, told: _Once, does: str) -> None:
    maintenance.recover_local(runtime)  # that one may have died since
    for other in workers.holders(runtime.database, job_id):
        told.tell(runtime, f"job {job_id}: another process {does}; waiting for {_named(other)}")


def with_unflushed(runtime: Runtime, status: JobStatus) -> JobStatus:
    """The status with the rows that this process has finished and not flushed: somebody watches, and should not see
    the bar stand still. They are not durable yet, so no other process is told of them."""
    mine = (n for shard_id, n in list(runtime.unflushed.items()) if shard_id.startswith(f"{status.id}."))
    return replace(status, rows_done=min(status.rows_done + sum(mine), status.rows_total))


class _Slot(threading.Thread):
    """Claims and runs one shard after the other until the job has none left."""

    def __init__(
        self,
        runtime: Runtime,
        job_id: str,
        keeper: LeaseKeeper,
        interrupt: Cancellation,
        ended: threading.Condition,
    ) -> None:
        super().__init__(name="rowmill-slot", daemon=True)
        self._runtime, self._job_id, self._keeper, self._interrupt = runtime, job_id, keeper, interrupt
        # Notified when an attempt has ended: those that found nothing to do look again, or are done as well.
        self._ended = ended
        # Not ``join``: Ctrl-C in the midst of one makes Python 3.11 believe that the thread has ended.
        self.done = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        forget = self._interrupt.on_cancel(self._wake)
        try:
            self._loop()
        except BaseException as error:
            self.error = error
        finally:
            forget()
            self._wake()
            self.done.set()

    def _wake(self) -> None:
        with self._ended:
            self._ended.notify_all()

    def _loop(self) -> None:
        runtime = self._runtime
        while not self._interrupt.cancelled:
            claim = claims.claim(
                runtime.database,
                owner=runtime.worker.id,
                lease_seconds=runtime.settings.lease_seconds,
                job_id=self._job_id,
            )
            if claim is not None:
                execute(runtime, claim, self._keeper, self._interrupt)
                self._wake()
                continue
            if jobs.get(runtime.database, self._job_id).n_open == 0:
                return
            with self._ended:
                if not self._interrupt.cancelled:
                    self._ended.wait(IDLE_SECONDS)
            if jobs.get(runtime.database, self._job_id).state is JobState.CANCELLING:
                while jobs.cancel_ready(runtime.database, self._job_id, actor=runtime.actor):
                    pass


def cancel_idle(runtime: Runtime, job_id: str) -> Job:
    """After a cancel in the embedded mode: publish what is done, unless a process of this host still runs the job."""
    maintenance.recover_local(runtime)
    with runtime.registered():
        while jobs.cancel_ready(runtime.database, job_id, actor=runtime.actor):
            pass
        return finalize_job(runtime, job_id) or jobs.get(runtime.database, job_id)
