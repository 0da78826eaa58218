"""What has to happen now and then, in any process: mend times after a clock was set back, take back lost shards, wind
down expired jobs, fire schedules, and delete garbage.

The steps of a round do not depend on each other: one that fails is logged, and the others run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.batches.drive import collect_files
from pipeline.jobs import deletion
from pipeline.process.runtime import Runtime, is_alive
from pipeline.result_cache import cache
from pipeline.schedules.fire import fire_schedules
from storage import failpoints
from storage.errors import IllegalTransition, Interrupted, RowmillError
from storage.files import batches
from storage.fleet import clock_steps, garbage, job_lookup, workers
from storage.fleet.garbage import Garbage
from storage.log_actions import Action
from storage.logs import get_logger
from storage.queue import jobs, reaper
from storage.queue.reaper import Reaped
from storage.states import JobState

log = get_logger(__name__)

T = TypeVar("T")

GARBAGE_SECONDS = 10.0
"""How long one round deletes at most, to within one call of the object store; the rest waits for the next."""
_FILES_AT_ONCE = 200


def run_step(step: Callable[..., T], *arguments: object) -> T | None:
    """The result of one step of a round; ``None``, and a line in the log, when it fails.

    What ends a process (``KeyboardInterrupt`` and its kin, :class:`Interrupted`) goes through.
    """
    try:
        return step(*arguments)
    except Interrupted:
        raise
    except RowmillError as error:
        log.warning(
            "a step of maintenance failed, the next round tries again: %s", error, action=Action.MAINTENANCE_POSTPONED
        )
    except Exception:
        log.exception("a step of maintenance failed, the next round tries again", action=Action.MAINTENANCE_POSTPONED)
    return None


def reap(runtime: Runtime) -> Reaped:
    """Take back the shards whose lease has run out."""
    settings = runtime.settings
    return reaper.reap(
        runtime.database,
        lease_seconds=settings.lease_seconds,
        max_losses=settings.max_losses,
        actor=runtime.actor,
    )


def bring_back_times(runtime: Runtime) -> None:
    """Bring back times that lie too far ahead, because the database's clock was set back since they were stored."""
    settings = runtime.settings
    moved = clock_steps.bring_back(
        runtime.database,
        lease_seconds=settings.lease_seconds,
        retention_seconds=settings.attempt_retention_hours * 3600,
    )
    if moved:
        log.warning(
            "the database's clock was set back: %d stored times lay too far ahead of it",
            moved,
            action=Action.CLOCK_SET_BACK,
        )


def recover_local(runtime: Runtime) -> Reaped:
    """Take back at once what processes held that are known to have ended: nobody needs to wait for their leases.

    Those are the dead ones of this host, and owners that are not registered any more.
    """
    bring_back_times(runtime)
    dead = [w.id for w in workers.on_host(runtime.database, runtime.worker.host) if not is_alive(w)]
    gone = [*dead, *workers.unknown_owners(runtime.database)]
    found = reaper.reap_owners(runtime.database, gone, max_losses=runtime.settings.max_losses, actor=runtime.actor)
    if gone:
        batches.free_leases(runtime.database, gone)
    for worker_id in dead:
        workers.unregister(runtime.database, worker_id)
    return found


def expire(runtime: Runtime) -> list[str]:
    """Begin to wind down the jobs whose completion window has passed; returns their ids."""
    due = jobs.expired(runtime.database)
    for job_id in due:
        try:
            jobs.request_stop(runtime.database, job_id, "expired", actor=runtime.actor)
        except IllegalTransition:
            continue  # it ended, or began to, in between
    return due


def wind_down(runtime: Runtime) -> None:
    """Cancel the shards that came back to jobs which are being wound down: reaped, or handed back by a worker."""
    for job in job_lookup.listed(runtime.database, state=JobState.CANCELLING, limit=100):
        while job.n_open and jobs.cancel_ready(runtime.database, job.id, actor=runtime.actor):
            pass


def collect_garbage(runtime: Runtime, *, budget: float = GARBAGE_SECONDS) -> int:
    """Delete what is due in the garbage queue, for ``budget`` seconds at most; returns how many locations.

    A location that cannot be deleted is logged and left for later, longer each time: it may never come back, and must
    not stand before the others.
    """
    end = time.monotonic() + budget
    deleted = 0
    for item in garbage.due(runtime.database):
        if time.monotonic() >= end:
            break
        try:
            deleted += _collect(runtime, item, end)
        except Exception as error:
            delay = garbage.postpone(runtime.database, item)
            log.warning(
                "%s could not be deleted, trying again in %.0f s: %s",
                item.uri,
                delay,
                error,
                action=Action.GARBAGE_POSTPONED,
            )
    return deleted


def _collect(runtime: Runtime, item: Garbage, end: float) -> bool:
    """Whether all of it is gone. What is left when the time is over is found again by the next round."""
    # Listed before it is handed over: from then on a retry may begin, whose attempts write below the same place.
    files = runtime.store.list_tree(item.uri)
    if not garbage.give_up(runtime.database, item):
        return False
    failpoints.hit("garbage.given_up")
    for at in range(0, max(len(files), 1), _FILES_AT_ONCE):
        if at and time.monotonic() >= end:
            return False
        runtime.store.delete_tree(item.uri, files[at : at + _FILES_AT_ONCE])
    garbage.forget(runtime.database, item)
    return True


def delete_jobs(runtime: Runtime, *, budget: float = GARBAGE_SECONDS) -> int:
    """Delete the jobs whose ``job_retention_days`` are over, for ``budget`` seconds at most; returns how many."""
    return deletion.delete_old(runtime, budget=budget)


def collect_results(runtime: Runtime) -> tuple[int, int]:
    """Delete cached results that are past their limits; returns how many files, and their bytes.

    It lists all of them, so no tick calls it.
    """
    settings = runtime.settings
    return cache.collect(
        runtime.store,
        settings.effective_result_cache,
        older_than=time.time() - 86_400 * settings.result_cache_days,
        most_bytes=settings.result_cache_bytes,
    )


def run_maintenance(runtime: Runtime, *, schedules: bool = True, gc: bool = True) -> list[str]:
    """One round: shards and jobs, and, where they are wanted, schedules and garbage.

    Returns the jobs that schedules submitted; the caller sees to it that they are run.
    """
    for step in (bring_back_times, reap, expire, wind_down):
        run_step(step, runtime)
    submitted = (run_step(fire_schedules, runtime) or []) if schedules else []
    if gc:
        run_gc(runtime)
    return submitted


def run_gc(runtime: Runtime) -> None:
    """The steps of a round that can wait: garbage, jobs past their retention, files that are deleted or expired."""
    for step in (collect_garbage, delete_jobs, collect_files):
        run_step(step, runtime)
