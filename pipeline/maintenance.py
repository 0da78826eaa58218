"""What has to happen now and then, whoever does it: take back lost shards, wind down expired jobs, delete garbage, and
fire schedules."""

from __future__ import annotations

import time

from pipeline import result_cache
from pipeline.runtime import Runtime, is_alive
from pipeline.schedule_firing import fire_schedules
from storage import failpoints, garbage, jobs, planners, reaping, workers
from storage.errors import IllegalTransition
from storage.reaping import Reaped
from storage.states import JobState


def reap(runtime: Runtime) -> Reaped:
    """Take back the shards whose lease has run out."""
    settings = runtime.settings
    return reaping.reap(
        runtime.database,
        lease_seconds=settings.lease_seconds,
        max_losses=settings.max_losses,
        actor=runtime.actor,
    )


def recover_local(runtime: Runtime) -> Reaped:
    """Take back at once what dead processes of this host held: nobody needs to wait for their leases."""
    dead = [w.id for w in workers.on_host(runtime.database, runtime.worker.host) if not is_alive(w)]
    found = reaping.reap_owners(runtime.database, dead, max_losses=runtime.settings.max_losses, actor=runtime.actor)
    if dead:
        planners.let_go(runtime.database, dead)
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
    for job in jobs.listed(runtime.database, state=JobState.CANCELLING, limit=100):
        while job.n_open and jobs.cancel_ready(runtime.database, job.id, actor=runtime.actor):
            pass


def collect_garbage(runtime: Runtime) -> int:
    """Delete what is due in the garbage queue; returns how many locations."""
    deleted = 0
    for item in garbage.due(runtime.database):
        # Listed before it is given up: from then on a retry may begin, whose attempts write below the same place.
        files = runtime.store.list_tree(item.uri)
        if garbage.give_up(runtime.database, item):
            failpoints.hit("garbage.given_up")
            runtime.store.delete_tree(item.uri, files)
            garbage.forget(runtime.database, item)
            deleted += 1
    return deleted


def collect_results(runtime: Runtime) -> tuple[int, int]:
    """Delete kept answers that are past their limits; returns how many files, and their bytes. All of them are listed:
    this is for now and then, and not for every tick."""
    settings = runtime.settings
    return result_cache.collect(
        runtime.store,
        settings.effective_result_cache,
        older_than=time.time() - 86_400 * settings.result_cache_days,
        most_bytes=settings.result_cache_bytes,
    )


def tend(runtime: Runtime) -> None:
    """One round of everything above."""
    reap(runtime)
    expire(runtime)
    wind_down(runtime)
    collect_garbage(runtime)


def tick(runtime: Runtime) -> list[str]:
    """One round, schedules included, for whoever sees to it that their jobs are run; returns the submitted jobs."""
    tend(runtime)
    return fire_schedules(runtime)
