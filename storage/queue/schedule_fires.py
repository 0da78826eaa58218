"""What a fire of a schedule writes inside the transactions of its job: the insertion, and the plan."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from storage import failpoints
from storage.errors import IllegalTransition
from storage.records import FireKey
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.transitions import move_fire
from storage.states import FireState


@dataclass(frozen=True, slots=True)
class ConsumedFiles:
    """The files (URI and etag) that the job of an incremental schedule takes: processed, once the job has completed."""

    schedule_id: str
    files: tuple[tuple[str, str], ...]


def lock(connection: sa.Connection, database: Database, key: FireKey) -> None:
    """Take hold of a pending fire, and of its schedule, until the transaction ends.

    Raises :class:`IllegalTransition` when it is not pending any more: another tick was faster, or the schedule is gone.
    """
    schedule, fire = tables.schedule, tables.schedule_fire
    connection.execute(database.locked(sa.select(schedule.c.id).where(schedule.c.id == key.schedule_id)))
    query = sa.select(fire.c.state).where(fire.c.schedule_id == key.schedule_id, fire.c.fire_at == key.fire_at)
    state = connection.execute(database.locked(query)).scalar()
    if state != FireState.PENDING:
        raise IllegalTransition("fire", state or "removed", FireState.SUBMITTED, "it has been seen to already")


def submitted(connection: sa.Connection, key: FireKey, job_id: str) -> None:
    """The locked fire has its job: in the transaction that inserts it, so that neither is ever without the other."""
    failpoints.hit("fire.inserted")
    if not move_fire(connection, key, FireState.SUBMITTED, job_id=job_id, reason=None):
        raise IllegalTransition("fire", "unlocked", FireState.SUBMITTED, "it was not pending")


def take(connection: sa.Connection, job_id: str, taken: ConsumedFiles, chunk: int = 500) -> None:
    """Note the files that a job takes, in the transaction that stores its plan."""
    rows = [{"job_id": job_id, "schedule_id": taken.schedule_id, "uri": uri, "etag": etag} for uri, etag in taken.files]
    for start in range(0, len(rows), chunk):
        connection.execute(tables.schedule_file.insert(), rows[start : start + chunk])


def take_for_good(connection: sa.Connection, job_id: str) -> None:
    """The job has completed: no later fire takes its files, even if it is retried and then ends otherwise."""
    file = tables.schedule_file
    connection.execute(file.update().where(file.c.job_id == job_id, file.c.done_at.is_(None)).values(done_at=now()))
