"""Schedules and their fires: made, looked at, paused, and advanced past each time at which they came due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage import failpoints
from storage.errors import Conflict, IllegalTransition, NotFound
from storage.records import Fire, FireKey, NewSchedule, Schedule
from storage.sql import row_mapping, tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read, values
from storage.sql.transitions import move_fire
from storage.states import TERMINAL_JOB, FireState, JobState

_schedule, _fire, _job = tables.schedule, tables.schedule_fire, tables.job
_fires = sa.select(_fire, _job.c.state.label("job_state")).outerjoin(_job, _job.c.id == _fire.c.job_id)
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class ConsumedFiles:
    """The files (URI and etag) that the job of an incremental schedule takes: processed, once the job has completed."""

    schedule_id: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class DueFire:
    """A fire to be recorded: as ``pending``, or as ``skipped`` for ``reason``. ``missed``: see :class:`Fire`."""

    fire_at: float
    state: FireState = FireState.PENDING
    reason: str | None = None
    missed: int = 0


def insert(database: Database, new: NewSchedule) -> Schedule:
    """Store a schedule. Raises :class:`Conflict` when the tenant has one of this name."""
    try:
        database.change(_schedule.insert().values(**values(new), created_at=now()))
    except IntegrityError:
        raise Conflict(
            f"there is a schedule {new.name!r} already; choose another name, or 'rowmill schedule remove {new.name}' "
            "first",
            field="name",
        ) from None
    return get(database, new.tenant, new.name)


def get(database: Database, tenant: str, name: str) -> Schedule:
    """The tenant's schedule of this name, or :class:`NotFound`."""
    found = database.record(Schedule, sa.select(_schedule).where(*_named(tenant, name)))
    if found is None:
        raise NotFound(f"there is no schedule {name!r}")
    return found


def listed(database: Database, *, tenant: str | None = None) -> list[Schedule]:
    """Schedules by name; of all tenants unless one is given."""
    query = sa.select(_schedule).order_by(_schedule.c.name, _schedule.c.tenant)
    if tenant is not None:
        query = query.where(_schedule.c.tenant == tenant)
    return database.records(Schedule, query)


def remove(database: Database, tenant: str, name: str) -> None:
    """Delete a schedule with its fires; their jobs stay.

    Raises :class:`Conflict` while a job of an incremental one waits for its plan: which files are new to it is known
    from the schedule alone.
    """
    with database.write() as connection:
        query = sa.select(_schedule.c.id, _schedule.c.incremental).where(*_named(tenant, name))
        found = connection.execute(database.locked(query)).first()
        if found is None:
            raise NotFound(f"there is no schedule {name!r}")
        unplanned = connection.execute(
            sa.select(_job.c.id)
            .join(_fire, _fire.c.job_id == _job.c.id)
            .where(_fire.c.schedule_id == found.id, _job.c.state == JobState.VALIDATING)
            .limit(1)
        ).scalar()
        if found.incremental and unplanned is not None:
            raise Conflict(f"job {unplanned} of schedule {name!r} is not planned yet: try again, or cancel it first")
        connection.execute(_schedule.delete().where(_schedule.c.id == found.id))


def pause(database: Database, tenant: str, name: str) -> Schedule:
    """Let nothing come due, and submit no fire that waits, until it is resumed. Harmless when it is paused."""
    database.change(_schedule.update().where(*_named(tenant, name)).values(paused=True))
    return get(database, tenant, name)


def resume(database: Database, schedule: Schedule, next_at: float) -> Schedule:
    """Go on, with ``next_at`` as the next time; harmless when it is not paused."""
    paused = (_schedule.c.id == schedule.id, _schedule.c.paused)
    database.change(_schedule.update().where(*paused).values(paused=False, next_at=next_at))
    return get(database, schedule.tenant, schedule.name)


def due(database: Database) -> list[tuple[Schedule, float]]:
    """The schedules whose time has come by the database's clock, and what that clock said."""
    return _with_clock(database, _schedule.c.next_at <= now())


def waiting(database: Database) -> list[tuple[Schedule, float]]:
    """The schedules whose time is still to come by the database's clock, and what that clock said."""
    return _with_clock(database, _schedule.c.next_at > now())


def _with_clock(database: Database, which: sa.ColumnElement[bool]) -> list[tuple[Schedule, float]]:
    query = sa.select(_schedule, now().label("clock")).where(~_schedule.c.paused, which)
    return [(read(Schedule, row), float(row.clock)) for row in database.rows(query)]


def advance(database: Database, schedule: Schedule, fires: Sequence[DueFire], next_at: float) -> bool:
    """Record what came due and move on to ``next_at``, in one transaction.

    ``False``, and nothing has changed, when the schedule is not as it was read: another tick was faster, or it was
    paused or removed. A fire that exists already stays unchanged.
    """
    with database.write() as connection:
        moved = connection.execute(
            _schedule.update()
            .where(_schedule.c.id == schedule.id, _schedule.c.next_at == schedule.next_at, ~_schedule.c.paused)
            .values(next_at=next_at)
        )
        if moved.rowcount != 1:
            return False
        # After the database's clock was put back, a time may come that has come before.
        times = [item.fire_at for item in fires]
        query = sa.select(_fire.c.fire_at).where(_fire.c.schedule_id == schedule.id, _fire.c.fire_at.in_(times))
        known = set(connection.execute(query).scalars())
        for item in fires:
            if item.fire_at in known:
                continue
            connection.execute(
                _fire.insert().values(
                    schedule_id=schedule.id,
                    fire_at=item.fire_at,
                    state=item.state,
                    reason=item.reason,
                    missed=item.missed,
                    decided_at=now(),
                    settled_at=None if item.state is FireState.PENDING else now(),
                )
            )
        return True


def pending(database: Database) -> list[tuple[Schedule, Fire]]:
    """The fires that wait for a job, of schedules that are not paused, oldest first."""
    query = (
        _fires.join(_schedule, _schedule.c.id == _fire.c.schedule_id)
        .where(_fire.c.state == FireState.PENDING, ~_schedule.c.paused)
        .order_by(_fire.c.fire_at)
    )
    with database.read() as connection:
        waiting = [read(Fire, row) for row in connection.execute(query)]
        wanted = {fire.schedule_id for fire in waiting}
        by_id = {row.id: read(Schedule, row) for row in connection.execute(sa.select(_schedule)) if row.id in wanted}
    return [(by_id[fire.schedule_id], fire) for fire in waiting]


def count_pending(database: Database, schedule_id: str) -> int:
    """How many fires of the schedule wait for a job."""
    query = sa.select(sa.func.count()).where(_fire.c.schedule_id == schedule_id, _fire.c.state == FireState.PENDING)
    return int(database.scalar(query))


def unfinished_before(database: Database, key: FireKey) -> list[Fire]:
    """Earlier fires of the schedule that are pending, or whose job has not ended; oldest first."""
    query = _fires.where(
        _fire.c.schedule_id == key.schedule_id,
        _fire.c.fire_at < key.fire_at,
        sa.or_(_fire.c.state == FireState.PENDING, _job.c.state.not_in(TERMINAL_JOB)),
    ).order_by(_fire.c.fire_at)
    return database.records(Fire, query)


def fires(database: Database, schedule_id: str, *, limit: int = 20) -> list[Fire]:
    """The schedule's fires, the newest first."""
    query = _fires.where(_fire.c.schedule_id == schedule_id).order_by(_fire.c.fire_at.desc()).limit(limit)
    return database.records(Fire, query)


def settle(database: Database, key: FireKey, state: FireState, reason: str) -> bool:
    """End a pending fire without a job; ``False`` when it was not pending any more."""
    with database.write() as connection:
        return move_fire(connection, key, state, reason=reason)


def note(database: Database, key: FireKey, reason: str) -> None:
    """Say what a pending fire waits for."""
    mine = (_fire.c.schedule_id == key.schedule_id, _fire.c.fire_at == key.fire_at)
    database.change(_fire.update().where(*mine, _fire.c.state == FireState.PENDING).values(reason=reason))


def lock_fire(connection: sa.Connection, database: Database, key: FireKey) -> None:
    """Take hold of a pending fire, and of its schedule, until the transaction ends.

    Raises :class:`IllegalTransition` when it is not pending any more: another tick was faster, or the schedule is gone.
    """
    connection.execute(database.locked(sa.select(_schedule.c.id).where(_schedule.c.id == key.schedule_id)))
    query = sa.select(_fire.c.state).where(_fire.c.schedule_id == key.schedule_id, _fire.c.fire_at == key.fire_at)
    state = connection.execute(database.locked(query)).scalar()
    if state != FireState.PENDING:
        raise IllegalTransition("fire", state or "removed", FireState.SUBMITTED, "it has been seen to already")


def mark_submitted(connection: sa.Connection, key: FireKey, job_id: str) -> None:
    """The locked fire has its job: in the transaction that inserts it, so that neither is ever without the other."""
    failpoints.hit("fire.inserted")
    if not move_fire(connection, key, FireState.SUBMITTED, job_id=job_id, reason=None):
        raise IllegalTransition("fire", "unlocked", FireState.SUBMITTED, "it was not pending")


def note_consumed(connection: sa.Connection, job_id: str, consumed: ConsumedFiles) -> None:
    """Note the files that a job takes, in the transaction that stores its plan."""
    rows = [
        {"job_id": job_id, "schedule_id": consumed.schedule_id, "uri": uri, "etag": etag}
        for uri, etag in consumed.files
    ]
    for start in range(0, len(rows), _CHUNK):
        row_mapping.insert(connection, tables.schedule_file, rows[start : start + _CHUNK])


def mark_processed(connection: sa.Connection, job_id: str) -> None:
    """The job has completed: no later fire takes its files, even if it is retried and then ends otherwise."""
    file = tables.schedule_file
    connection.execute(file.update().where(file.c.job_id == job_id, file.c.done_at.is_(None)).values(done_at=now()))


def live_jobs(database: Database) -> list[str]:
    """Ids of the jobs of fires that have not ended, the oldest first."""
    query = (
        sa.select(_job.c.id)
        .join(_fire, _fire.c.job_id == _job.c.id)
        .where(_job.c.state.not_in(TERMINAL_JOB))
        .order_by(_job.c.id)
    )
    return database.scalars(query)


def incremental_of(database: Database, job_id: str) -> str | None:
    """The id of the incremental schedule whose fire submitted the job, if any."""
    query = (
        sa.select(_schedule.c.id)
        .join(_fire, _fire.c.schedule_id == _schedule.c.id)
        .where(_fire.c.job_id == job_id, _schedule.c.incremental)
    )
    found: str | None = database.scalar(query)
    return found


def processed(database: Database, schedule_id: str, uris: Sequence[str]) -> set[tuple[str, str]]:
    """Those (URI, etag) among the files that a job of the schedule has taken and completed, whatever it does now."""
    file = tables.schedule_file
    found: set[tuple[str, str]] = set()
    with database.read() as connection:
        for start in range(0, len(uris), _CHUNK):
            query = sa.select(file.c.uri, file.c.etag).where(
                file.c.schedule_id == schedule_id,
                file.c.uri.in_(uris[start : start + _CHUNK]),
                file.c.done_at.is_not(None),
            )
            found.update((row.uri, row.etag) for row in connection.execute(query))
    return found


def _named(tenant: str, name: str) -> tuple[sa.ColumnElement[bool], ...]:
    return _schedule.c.tenant == tenant, _schedule.c.name == name
