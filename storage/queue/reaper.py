"""Taking back shards whose attempt is gone: its lease ran out, or its process is known to be dead."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.deaths import Step, after_loss
from storage.queue import attempts, job_deaths, job_progress
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.transitions import move_attempt, move_shard
from storage.states import AttemptState, ShardState


@dataclass(frozen=True, slots=True)
class Reaped:
    """``ready`` shards may be claimed again; ``failed`` ones have spent their budget of losses."""

    ready: int
    failed: int


def reap(database: Database, *, lease_seconds: float, max_losses: int, actor: str, batch: int = 200) -> Reaped:
    """Take back shards whose lease has run out.

    Nothing is taken back within one lease of the database's own start: an outage must not cost every worker its shards.
    """
    shard = tables.shard
    if not database.sqlite:
        started = sa.cast(sa.extract("epoch", sa.func.pg_postmaster_start_time()), sa.Double)
        # A start that is still to come says only that the clock was set back since.
        if 0 <= database.scalar(sa.select(now() - started)) < lease_seconds:
            return Reaped(0, 0)
    return _take_back(
        database, shard.c.lease_until < now(), "its lease ran out", max_losses=max_losses, actor=actor, batch=batch
    )


def reap_owners(database: Database, owners: Collection[str], *, max_losses: int, actor: str) -> Reaped:
    """Take back the shards of workers that are known to be dead, without waiting for their leases."""
    if not owners:
        return Reaped(0, 0)
    condition = tables.shard.c.lease_owner.in_(list(owners))
    job_deaths.count(database, max_losses=max_losses, actor=actor, owners=owners)
    return _take_back(database, condition, "its worker died", max_losses=max_losses, actor=actor, batch=200)


def _take_back(
    database: Database, condition: sa.ColumnElement[bool], why: str, *, max_losses: int, actor: str, batch: int
) -> Reaped:
    shard = tables.shard
    query = sa.select(shard).where(shard.c.state == ShardState.RUNNING, condition)
    query = query.order_by(shard.c.tenant, shard.c.id).limit(batch)  # as its index has them
    ready = failed = 0
    while True:
        moved = 0
        for row in database.rows(query):
            target = _lose(database, row, why, max_losses=max_losses, actor=actor)
            moved += target is not None
            ready += target is ShardState.READY
            failed += target is ShardState.FAILED
        if not moved:
            return Reaped(ready, failed)


def _lose(database: Database, row: sa.Row[Any], why: str, *, max_losses: int, actor: str) -> ShardState | None:
    shard, job = tables.shard, tables.job
    with database.write() as connection:
        locked = connection.execute(database.locked(sa.select(job).where(job.c.id == row.job_id))).one()
        attempt = attempts.read_attempt(connection, row.id, row.attempt_no)
        step, progress, alone = attempt.step, attempts.has_progress(attempt), attempt.alone is not None
        cost = after_loss(step, row.n_crash, row.n_lost, progress=progress, alone=alone)
        blamed = attempts.suspects(attempt, opens=cost.opens) if step is Step.COMPUTING else {}
        fails = cost.is_spent(max_losses)
        target = ShardState.FAILED if fails else ShardState.READY
        count = max(cost.losses, cost.crashes)
        reason = f"{count} attempts in a row were lost without progress, the last one {step.phrase}"
        moved = move_shard(
            connection,
            row,
            target,
            actor,
            guard=shard.c.lease_until == row.lease_until,
            n_lost=cost.losses,
            n_crash=cost.crashes,
            error=reason if fails else row.error,
            data={"lost": cost.losses, "crashes": cost.crashes, "owner": row.lease_owner, "step": step},
            **blamed,
        )
        if not moved:
            return None
        error = f"{why} {step.phrase}"
        move_attempt(connection, row.id, row.attempt_no, AttemptState.RUNNING, AttemptState.LOST, error=error)
        if fails:
            if step is not Step.COMPUTING and not _has_computed(connection, row.job_id):
                # What no row is to blame for would end each of the job's shards in turn.
                job_progress.fail_whole(
                    connection, locked, f"its worker died {step.phrase}, {count} times in a row", actor
                )
                locked = connection.execute(sa.select(job).where(job.c.id == row.job_id)).one()
            job_progress.close_shard(connection, locked, actor, failed=True)
        return target


def _has_computed(connection: sa.Connection, job_id: str) -> bool:
    """Whether any row of the job is done."""
    shard = tables.shard
    query = sa.select(shard.c.id).where(shard.c.job_id == job_id, shard.c.n_done > 0).limit(1)
    return connection.execute(query).first() is not None
