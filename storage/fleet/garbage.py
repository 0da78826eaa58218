"""Files of ended attempts that may be deleted, and when. Nothing is deleted that is not in this queue."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from storage.records import OUTPUT_SEQ
from storage.sql import tables, upsert
from storage.sql.database import Database, now
from storage.states import TERMINAL_JOB, ShardState

FIRST_DELAY_SECONDS = 60.0
LONGEST_DELAY_SECONDS = 24 * 3600.0
"""How long an entry that could not be deleted waits for the next try: at first, and at most."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """Everything below ``uri`` may go from ``not_before`` on (Unix seconds); it was made for ``job_id``.

    ``n_fail`` counts the times that it could not be deleted.
    """

    uri: str
    job_id: str
    not_before: float
    n_fail: int = 0


def enqueue(database: Database, job_id: str, uri: str, *, delay: float) -> None:
    """Queue what is below ``uri`` for deletion in ``delay`` seconds. What is queued already keeps its time.

    Nothing, when the job is being deleted: its files go with it.
    """
    job = tables.job
    mine = sa.select(sa.literal(uri), job.c.id, now() + delay).where(job.c.id == job_id, job.c.deleted_at.is_(None))
    with database.write() as connection:
        statement = upsert.insert(connection, tables.gc_queue).from_select(["uri", "job_id", "not_before"], mine)
        connection.execute(statement.on_conflict_do_nothing())


def due(database: Database, *, limit: int = 100) -> list[Garbage]:
    """What may be deleted now, longest due first."""
    table = tables.gc_queue
    query = sa.select(table).where(table.c.not_before <= now()).order_by(table.c.not_before).limit(limit)
    return database.records(Garbage, query)


def give_up(database: Database, item: Garbage) -> bool:
    """Forget the part files that are about to be deleted; false, and nothing has changed, when a retry needs them.

    Rows of unfinished shards that only those files held count as not done from now on: a later retry computes them.
    """
    job, shard, part = tables.job, tables.shard, tables.part_file
    with database.write() as connection:
        state = connection.execute(database.locked(sa.select(job.c.state).where(job.c.id == item.job_id))).scalar()
        if state is not None and state not in TERMINAL_JOB:
            connection.execute(tables.gc_queue.delete().where(tables.gc_queue.c.uri == item.uri))
            return False
        unfinished = sa.select(shard.c.id).where(
            shard.c.job_id == item.job_id, shard.c.state.in_((ShardState.FAILED, ShardState.CANCELLED))
        )
        connection.execute(part.delete().where(part.c.shard_id.in_(unfinished), part.c.seq != OUTPUT_SEQ))
        exception = tables.row_exception
        connection.execute(exception.delete().where(exception.c.shard_id.in_(unfinished)))
        connection.execute(
            shard.update()
            .where(shard.c.id.in_(unfinished))
            .values(done=None, failed=None, n_done=0, n_failed=0, **dict.fromkeys(tables.TOKENS, 0))
        )
    return True


def forget(database: Database, item: Garbage) -> None:
    """Take an entry off the queue, after its files were deleted; not one that was made for the same place since."""
    table = tables.gc_queue
    database.change(table.delete().where(table.c.uri == item.uri, table.c.not_before == item.not_before))


def postpone(database: Database, item: Garbage) -> float:
    """Leave an entry that could not be deleted for later, each time twice as long; returns the seconds."""
    table = tables.gc_queue
    delay = float(min(FIRST_DELAY_SECONDS * 2 ** min(item.n_fail, 30), LONGEST_DELAY_SECONDS))
    same = (table.c.uri == item.uri, table.c.not_before == item.not_before)
    database.change(table.update().where(*same).values(not_before=now() + delay, n_fail=item.n_fail + 1))
    return delay
