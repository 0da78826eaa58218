"""Taking back shards whose attempt is gone: its lease ran out, or its process is known to be dead."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage import tables
from storage.database import Database, now
from storage.shards import CAREFUL_AFTER, MOST_CRASHES, close_shard
from storage.states import AttemptState, ShardState
from storage.transitions import move_attempt, move_shard


@dataclass(frozen=True, slots=True)
class Reaped:
    """``ready`` shards may be claimed again; ``dead`` ones have spent their budget of losses."""

    ready: int
    dead: int


def reap(database: Database, *, lease_seconds: float, max_losses: int, actor: str, batch: int = 200) -> Reaped:
    """Take back shards whose lease has run out.

    Nothing is taken back within one lease of the database's own start: an outage must not cost every worker its shards.
    """
    shard = tables.shard
    if not database.sqlite:
        started = sa.cast(sa.extract("epoch", sa.func.pg_postmaster_start_time()), sa.Double)
        with database.read() as connection:
            if connection.execute(sa.select(now() - started)).scalar_one() < lease_seconds:
                return Reaped(0, 0)
    return _take_back(
        database, shard.c.lease_until < now(), "its lease ran out", max_losses=max_losses, actor=actor, batch=batch
    )


def reap_owners(database: Database, owners: Collection[str], *, max_losses: int, actor: str) -> Reaped:
    """Take back the shards of workers that are known to be dead, without waiting for their leases."""
    if not owners:
        return Reaped(0, 0)
    condition = tables.shard.c.lease_owner.in_(list(owners))
    with database.write() as connection:
        job = tables.job
        connection.execute(
            job.update().where(job.c.finalize_owner.in_(list(owners))).values(finalize_owner=None, finalize_until=None)
        )
    return _take_back(database, condition, "its worker died", max_losses=max_losses, actor=actor, batch=200)


def _take_back(
    database: Database, condition: sa.ColumnElement[bool], why: str, *, max_losses: int, actor: str, batch: int
) -> Reaped:
    shard = tables.shard
    query = sa.select(shard).where(shard.c.state == ShardState.RUNNING, condition)
    query = query.order_by(shard.c.tenant, shard.c.id).limit(batch)  # as its index has them
    ready = dead = 0
    while True:
        with database.read() as connection:
            found = connection.execute(query).all()
        moved = 0
        for row in found:
            target = _lose(database, row, why, max_losses=max_losses, actor=actor)
            moved += target is not None
            ready += target is ShardState.READY
            dead += target is ShardState.FAILED
        if not moved:
            return Reaped(ready, dead)


def _lose(database: Database, row: sa.Row[Any], why: str, *, max_losses: int, actor: str) -> ShardState | None:
    shard, job = tables.shard, tables.job
    # A loss counts against the budget only when the attempt left no progress behind: a shard that is flushed a little
    # further each time gets through, however often its worker dies.
    with database.write() as connection:
        locked = connection.execute(database.locked(sa.select(job).where(job.c.id == row.job_id))).one()
        attempt = tables.attempt
        computed = connection.execute(
            sa.select(attempt.c.rows_computed).where(
                attempt.c.shard_id == row.id, attempt.c.attempt_no == row.attempt_no
            )
        ).scalar_one()
        crashes = row.n_crash + 1 if row.n_crash >= CAREFUL_AFTER or not computed else 0
        searching = crashes >= CAREFUL_AFTER
        lost = 0 if computed else row.n_lost if searching else row.n_lost + 1
        given_up = crashes >= MOST_CRASHES or lost >= max_losses
        target = ShardState.FAILED if given_up else ShardState.READY
        reason = f"given up after {max(lost, crashes)} attempts in a row were lost without progress"
        error = reason if given_up else row.error
        moved = move_shard(
            connection,
            row,
            target,
            actor,
            guard=shard.c.lease_until == row.lease_until,
            n_lost=lost,
            n_crash=crashes,
            error=error,
            data={"lost": lost, "crashes": crashes, "owner": row.lease_owner},
        )
        if not moved:
            return None
        move_attempt(connection, row.id, row.attempt_no, AttemptState.RUNNING, AttemptState.LOST, error=why)
        if target is ShardState.FAILED:
            close_shard(connection, locked, actor, dead=True)
        return target
