"""Firing what has come due: first record it, then submit its job. Any number of processes may do so at once.

Two transactions, and a crash between any two statements is harmless. The first moves the schedule past the times that
have come and records their fires as pending, if nobody else did. The second inserts a fire's job and marks the fire as
submitted, if nobody else did. Which times have come, the database's clock says; what else is needed follows from the
time of the fire.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from pipeline.inputs import discovery
from pipeline.jobs.control import cancel_job
from pipeline.jobs.preflight import absolute
from pipeline.jobs.submit import submit_job
from pipeline.process.runtime import Runtime
from pipeline.schedules.cron import MOST_WAITING, CronTimes, due, local
from pipeline.schedules.spec import job_fields
from pipeline.spec.job_spec import parse
from storage import failpoints
from storage.errors import CommitUnknown, IllegalTransition, RowmillError, TransientError
from storage.log_actions import Action
from storage.logs import get_logger
from storage.queue import schedules
from storage.queue.schedules import DueFire
from storage.records import Fire, Schedule
from storage.redaction import redact_text
from storage.states import FireState, JobState

log = get_logger(__name__)


def fire_schedules(runtime: Runtime) -> list[str]:
    """Record the fires of every schedule whose time has come, and submit the jobs that may begin; returns their ids.

    What is wrong with one fire is recorded with it and stops no other. Raises :class:`TransientError` when the database
    does not answer.
    """
    _bring_back(runtime)
    for schedule, clock in schedules.due(runtime.database):
        try:
            decided, next_at = _decide(runtime, schedule, clock)
        except ValueError as error:  # this process's time zone data lack the zone, or the cron's last day is over
            log.error(  # noqa: TRY400 - the message says it all
                "schedule %s cannot fire: %s",
                schedule.name,
                error,
                action=Action.SCHEDULE_UNUSABLE,
                schedule=schedule.name,
            )
            continue
        if schedules.advance(runtime.database, schedule, decided, next_at):
            failpoints.hit("fire.decided")
    submitted = []
    for schedule, fire in schedules.pending(runtime.database):
        try:
            job_id = _submit(runtime, schedule, fire)
        except (TransientError, CommitUnknown) as error:
            log.warning(
                "schedule %s: the next tick tries again: %s",
                schedule.name,
                error,
                action=Action.SCHEDULE_POSTPONED,
                schedule=schedule.name,
            )
            _note(runtime, fire, f"the next tick tries again: {error}")
            continue
        if job_id is not None:
            submitted.append(job_id)
    return submitted


def _bring_back(runtime: Runtime) -> None:
    """Mend the next times that were found while the database's clock was ahead: none is later than the cron's next."""
    for schedule, clock in schedules.waiting(runtime.database):
        with suppress(ValueError):  # told when it comes due
            next_at = CronTimes(schedule.cron, schedule.tz).next_after(clock)
            if next_at < schedule.next_at:
                schedules.advance(runtime.database, schedule, [], next_at)


def _decide(runtime: Runtime, schedule: Schedule, clock: float) -> tuple[list[DueFire], float]:
    times = CronTimes(schedule.cron, schedule.tz)
    room = MOST_WAITING - schedules.count_pending(runtime.database, schedule.id)
    found = due(
        times,
        schedule.next_at,
        clock,
        every=schedule.misfire == "all",
        grace=schedule.misfire_grace,
        most=room,
    )
    if found.late is not None:
        reason = f"noticed {clock - found.late:,.0f} s late, and misfire_grace is {schedule.misfire_grace:,.0f} s"
        return [DueFire(found.late, FireState.SKIPPED, reason, found.missed)], found.next_at
    if room <= 0:
        reason = f"{MOST_WAITING} earlier fires still wait for their job"
        return [DueFire(found.run[-1], FireState.SKIPPED, reason, found.missed)], found.next_at
    first = found.run[0]
    return [DueFire(at, missed=found.missed if at == first else 0) for at in found.run], found.next_at


def _submit(runtime: Runtime, schedule: Schedule, fire: Fire) -> str | None:
    try:
        times = CronTimes(schedule.cron, schedule.tz)
        if not _may_begin(runtime, schedule, fire, times):
            return None
        fields = job_fields(schedule.spec, schedule.name, times, fire.fire_at)
        if schedule.incremental:
            done = partial(schedules.processed, runtime.database, schedule.id)
            if not discovery.new_files(runtime.store, absolute(parse(fields), registered=True), done):
                reason = "no file is new since the last completed fire"
                schedules.settle(runtime.database, fire.key, FireState.EMPTY, reason)
                return None
        job = submit_job(runtime, fields, fire=fire.key)
    except IllegalTransition:
        return None  # another tick was faster
    except (TransientError, CommitUnknown):
        raise
    except RowmillError as error:
        schedules.settle(runtime.database, fire.key, FireState.FAILED, str(error))
        return None
    except Exception as error:
        log.exception(
            "schedule %s: a fire could not be submitted",
            schedule.name,
            action=Action.SCHEDULE_FIRE_FAILED,
            schedule=schedule.name,
        )
        reason = redact_text(f"unexpected {type(error).__name__}: {error}")
        schedules.settle(runtime.database, fire.key, FireState.FAILED, reason)
        return None
    failpoints.hit("fire.submitted")
    return job.id


def _may_begin(runtime: Runtime, schedule: Schedule, fire: Fire, times: CronTimes) -> bool:
    """Whether no earlier fire is in the way; what to do about one that is, is the schedule's ``overlap``."""
    earlier = schedules.unfinished_before(runtime.database, fire.key)
    if schedule.overlap == "cancel-previous":
        for item in earlier:
            if item.job_id is None:
                reason = f"replaced by the fire of {local(times, fire.fire_at)}"
                schedules.settle(runtime.database, item.key, FireState.SKIPPED, reason)
            # A job that is only being published costs nothing more: it is waited for, its work is not thrown away.
            elif item.job_state is not JobState.FINALIZING:
                with suppress(IllegalTransition):  # it has ended meanwhile
                    cancel_job(runtime, item.job_id)
        earlier = schedules.unfinished_before(runtime.database, fire.key)
    if not earlier:
        return True
    last = earlier[-1]
    holder = f"job {last.job_id} ({last.job_state})" if last.job_id is not None else "it waits for its job itself"
    reason = f"the fire of {local(times, last.fire_at)} has not ended: {holder}"
    if schedule.overlap == "skip":
        schedules.settle(runtime.database, fire.key, FireState.SKIPPED, reason)
    else:
        _note(runtime, fire, f"waits: {reason}")
    return False


def _note(runtime: Runtime, fire: Fire, reason: str) -> None:
    if fire.reason != reason:
        schedules.note(runtime.database, fire.key, reason)
