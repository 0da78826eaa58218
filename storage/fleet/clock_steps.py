"""Stored times after the database's clock was set back: one rule for all of them.

A time that is stored for later was ``now() + n``, and each kind of time has a longest ``n``. One that lies further
ahead was stored while the clock was wrong, and nobody may wait for it. What waits for its turn is due. A lease counts
from now on: a live owner renews it, a dead one loses it one lease later. The queries that read these times need not
know of this, and keep their indexes.

Not here: a round of maintenance in the future (``storage.fleet.maintenance_lock``), and the next time of a schedule,
which follows from its cron expression (``pipeline.schedules.fire``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.fleet.garbage import LONGEST_DELAY_SECONDS
from storage.records import LONGEST_BACKOFF_SECONDS, LONGEST_POSTPONEMENT_SECONDS
from storage.sql import tables
from storage.sql.database import Database, now
from storage.states import TERMINAL_JOB, ShardState

_BATCH = 1000


@dataclass(frozen=True, slots=True)
class _Kind:
    """The times in ``column`` of the rows ``where``. One more than ``most`` seconds ahead becomes ``now() + then``."""

    column: sa.Column[Any]
    where: sa.ColumnElement[bool]
    most: float
    then: float


def bring_back(database: Database, *, lease_seconds: float, retention_seconds: float) -> int:
    """Bring every stored time that lies too far ahead back to where it can be; returns how many there were.

    ``lease_seconds`` is the caller's; a lease may be as long as the longest of any registered worker.
    ``retention_seconds``: how long the files of ended attempts are kept.
    """
    return sum(_bring_back(database, kind) for kind in _kinds(_longest(database, lease_seconds), retention_seconds))


def _longest(database: Database, lease_seconds: float) -> float:
    return max(lease_seconds, database.scalar(sa.select(sa.func.max(tables.worker.c.lease_seconds))) or 0.0)


def _kinds(lease: float, retention: float) -> Iterator[_Kind]:
    shard, job, worker, garbage = tables.shard.c, tables.job.c, tables.worker.c, tables.gc_queue.c
    # As the indexes of these jobs have it: the live ones, and those that are published once more.
    open_jobs = sa.or_(job.state.not_in(TERMINAL_JOB), job.needs_republish)
    kept = max(retention, LONGEST_DELAY_SECONDS)
    yield _Kind(shard.run_after, shard.state == ShardState.READY, LONGEST_BACKOFF_SECONDS, 0.0)
    # It waits for this time again when its attempt is lost, or hands it back.
    yield _Kind(shard.run_after, shard.state == ShardState.RUNNING, LONGEST_BACKOFF_SECONDS, 0.0)
    yield _Kind(shard.lease_until, shard.state == ShardState.RUNNING, lease, lease)
    yield _Kind(job.finalize_until, sa.and_(open_jobs, job.finalize_owner.is_not(None)), lease, lease)
    waiting = sa.and_(open_jobs, job.finalize_owner.is_(None))
    yield _Kind(job.finalize_until, waiting, LONGEST_POSTPONEMENT_SECONDS, 0.0)
    # A heartbeat is a time that has passed: one to come says nothing of when the worker was last alive.
    yield _Kind(worker.heartbeat_at, sa.true(), 0.0, 0.0)
    yield _Kind(garbage.not_before, sa.true(), kept, kept)


def _bring_back(database: Database, kind: _Kind) -> int:
    table: Any = kind.column.table
    key = next(iter(table.primary_key.columns))
    ahead = sa.select(key).where(kind.where, kind.column > now() + kind.most).order_by(key).limit(_BATCH)
    moved = 0
    while True:
        if database.row(ahead.limit(1)) is None:
            return moved
        with database.write() as connection:
            # What somebody has locked is being changed by them, or is seen to by the next round.
            keys = list(connection.execute(database.locked(ahead, skip=True)).scalars())
            connection.execute(table.update().where(key.in_(keys)).values({kind.column.name: now() + kind.then}))
        moved += len(keys)
        if not keys:
            return moved
