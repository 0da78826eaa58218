"""The two kinds of beat: one that wakes the workers, and, where there is no broker, one that does it all itself."""

from __future__ import annotations

from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.process.runtime import Runtime
from pipeline.worker import beat_health, embedded, maintenance
from storage.broker import Wakeups
from storage.errors import Conflict, IllegalTransition, Interrupted, RowmillError, TransientError
from storage.log_actions import Action
from storage.logs import get_logger
from storage.queue import jobs, schedules
from storage.states import TERMINAL_JOB

log = get_logger(__name__)


def wake_workers(settings: Settings, interrupt: Cancellation) -> None:
    """Have a worker tick every ``tick_seconds``, until ``interrupt`` fires; nothing is remembered from one to the next.

    A broker that does not answer is asked again at the next.
    """
    wakeups = Wakeups(settings.broker_url)
    while not interrupt.cancelled:
        wakeups.tick()
        beat_health.note_round(settings)
        interrupt.wait(settings.tick_seconds)


def beat_and_run(runtime: Runtime, interrupt: Cancellation) -> None:
    """Tick every ``tick_seconds`` and run what schedules have submitted, until ``interrupt`` fires.

    It goes on ticking while a job runs. Jobs that an earlier process left are resumed. Any number of such processes may
    share a database: a job that another one runs is left to it.
    """
    while not interrupt.cancelled:
        try:
            _tick(runtime)
            for job_id in schedules.live_jobs(runtime.database):
                _run(runtime, job_id, interrupt)
        except TransientError as error:
            log.warning("the next round tries again: %s", error, action=Action.BEAT_POSTPONED)
        except Interrupted:
            return
        interrupt.wait(runtime.settings.tick_seconds)


def _tick(runtime: Runtime) -> None:
    maintenance.run_maintenance(runtime)
    beat_health.note_round(runtime.settings)


def _run(runtime: Runtime, job_id: str, interrupt: Cancellation) -> None:
    job = jobs.get(runtime.database, job_id)
    if job.state in TERMINAL_JOB:
        return
    try:
        status = embedded.run_job(runtime, job, interrupt=interrupt, tick=_tick)
    except (Conflict, IllegalTransition):
        return  # another process is at it
    except (TransientError, Interrupted):
        raise
    except RowmillError as error:
        runtime.notify(f"job {job_id}: {error}")
        return
    runtime.notify(f"job {job_id} {status.state}: {status.rows_done:,} rows to {status.output}")
