"""The only writer of ``state`` columns: checks the table, updates under a guard, leaves an event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from storage.errors import IllegalTransition
from storage.records import FireKey
from storage.sql import tables
from storage.sql.database import now
from storage.states import AttemptState, FireState, JobState, ShardState, check


def record(
    connection: sa.Connection,
    job_id: str,
    kind: str,
    actor: str,
    *,
    shard_id: str | None = None,
    attempt_no: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Add one event to the job's audit trail."""
    connection.execute(
        tables.event.insert().values(
            job_id=job_id,
            shard_id=shard_id,
            attempt_no=attempt_no,
            type=kind,
            at=now(),
            actor=actor,
            data=dict(data or {}),
        )
    )


def move_job(
    connection: sa.Connection,
    job_id: str,
    source: JobState,
    target: JobState,
    actor: str,
    *,
    data: Mapping[str, Any] | None = None,
    **values: Any,
) -> None:
    """Move a job that is ``source`` to ``target``. Raises :class:`IllegalTransition`; then nothing has changed."""
    check(source, target)
    job = tables.job
    result = connection.execute(
        job.update().where(job.c.id == job_id, job.c.state == source).values(state=target, **values)
    )
    if result.rowcount != 1:
        raise IllegalTransition("job", source, target, "it has moved on")
    record(connection, job_id, f"job.{target}", actor, data=data)


def move_shard(
    connection: sa.Connection,
    shard: sa.Row[Any],
    target: ShardState,
    actor: str,
    *,
    guard: sa.ColumnElement[bool] | None = None,
    data: Mapping[str, Any] | None = None,
    **values: Any,
) -> bool:
    """Move a shard on; ``False`` when the guard (or its state) no longer holds, and then nothing has changed.

    ``shard`` needs ``id``, ``job_id``, ``state`` and ``attempt_no``: the update requires all of them to be as read.
    """
    check(ShardState(shard.state), target)
    table = tables.shard
    where = [table.c.id == shard.id, table.c.state == shard.state, table.c.attempt_no == shard.attempt_no]
    if guard is not None:
        where.append(guard)
    if target is not ShardState.RUNNING:
        values |= {"lease_owner": None, "lease_until": None}
    result = connection.execute(table.update().where(*where).values(state=target, **values))
    if result.rowcount != 1:
        return False
    number = values.get("attempt_no", shard.attempt_no)
    record(connection, shard.job_id, f"shard.{target}", actor, shard_id=shard.id, attempt_no=number, data=data)
    return True


def move_attempt(
    connection: sa.Connection,
    shard_id: str,
    attempt_no: int,
    source: AttemptState,
    target: AttemptState,
    **values: Any,
) -> bool:
    """Move an attempt on; ``False`` when it was not ``source``. Its event is the shard's."""
    check(source, target)
    table = tables.attempt
    result = connection.execute(
        table.update()
        .where(table.c.shard_id == shard_id, table.c.attempt_no == attempt_no, table.c.state == source)
        .values(state=target, ended_at=now(), **values)
    )
    return result.rowcount == 1


def move_fire(connection: sa.Connection, key: FireKey, target: FireState, **values: Any) -> bool:
    """Settle a pending fire of a schedule; ``False`` when it was not pending. It has no event: its row says it all."""
    check(FireState.PENDING, target)
    table = tables.schedule_fire
    result = connection.execute(
        table.update()
        .where(
            table.c.schedule_id == key.schedule_id,
            table.c.fire_at == key.fire_at,
            table.c.state == FireState.PENDING,
        )
        .values(state=target, settled_at=now(), **values)
    )
    return result.rowcount == 1
