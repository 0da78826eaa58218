"""Claiming a shard, and keeping it: the lease protocol.

A claim raises the shard's ``attempt_no`` by one; that number is the fence. It only ever grows, and every later write of
the attempt requires it unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from storage.queue import fair_queue
from storage.records import OUTPUT_SEQ, Claim, Job, PartFile, Shard, Source
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read
from storage.sql.transitions import move_job, move_shard
from storage.states import AttemptState, JobState, ShardState


class Lease(StrEnum):
    """What a heartbeat found."""

    HELD = "held"
    STOPPING = "stopping"
    """Still held, but the job is being wound down: flush and end."""
    LOST = "lost"
    """Another attempt may own the shard: write nothing more."""


def claim(
    database: Database,
    *,
    owner: str,
    lease_seconds: float,
    queues: Collection[str] | None = None,
    job_id: str | None = None,
    warm: Collection[str] = (),
    sticky_keys: Collection[str] = (),
) -> Claim | None:
    """Lease the next ready shard to ``owner``; ``None`` when there is none, or none may run now.

    Which one: highest priority, then the tenant whose turn it is and that has fewer than its ``max_running`` at work,
    then the engines in ``warm`` (engine keys loaded in this process), then the longest due (see ``fair_queue``).
    Engines in ``sticky_keys`` were loaded too recently to have repaid their loading time; of one priority, shards for
    them go first, even if it is another tenant's turn. ``queues`` and ``job_id`` narrow the choice; within one job
    there is no question of turns. One transaction raises the fence, sets the lease and opens the attempt.
    """
    with database.write() as connection:
        flow = None
        if job_id is not None:
            found = fair_queue.next_of_job(database, connection, job_id, queues)
        else:
            chosen = fair_queue.next_shard(database, connection, queues=queues, warm=warm, sticky_keys=sticky_keys)
            found, flow = chosen or (None, None)
        if found is None:
            return None
        number = found.attempt_no + 1
        lease = {"attempt_no": number, "lease_owner": owner, "lease_until": now() + lease_seconds}
        if not move_shard(connection, found, ShardState.RUNNING, owner, **lease):
            return None
        connection.execute(
            tables.attempt.insert().values(
                shard_id=found.id,
                attempt_no=number,
                worker_id=owner,
                state=AttemptState.RUNNING,
                started_at=now(),
                rows_resumed=found.n_done,
            )
        )
        _mark_started(database, connection, found.job_id, owner)
        claimed = _read_claim(connection, found.id, number, owner)
        if flow is not None:
            fair_queue.charge(connection, flow, len(claimed.todo))
        return claimed


def _mark_started(database: Database, connection: sa.Connection, job_id: str, owner: str) -> None:
    # Whoever commits or cancels locks the job first and its shards after; here the shard is locked already, so waiting
    # for the job could deadlock. A job locked by somebody else is skipped: the next claim marks it.
    job = tables.job
    query = sa.select(job.c.id).where(job.c.id == job_id, job.c.state == JobState.QUEUED)
    if connection.execute(database.locked(query, skip=True)).first() is not None:
        started = sa.func.coalesce(job.c.started_at, now())
        move_job(connection, job_id, JobState.QUEUED, JobState.IN_PROGRESS, owner, started_at=started)


def _read_claim(connection: sa.Connection, shard_id: str, number: int, owner: str) -> Claim:
    shard = read(Shard, connection.execute(sa.select(tables.shard).where(tables.shard.c.id == shard_id)).one())
    job = read(Job, connection.execute(sa.select(tables.job).where(tables.job.c.id == shard.job_id)).one())
    part = tables.part_file
    parts = connection.execute(
        sa.select(part)
        .where(part.c.shard_id == shard_id, part.c.seq != OUTPUT_SEQ)
        .order_by(part.c.attempt_no, part.c.seq)
    )
    return Claim(
        shard=shard,
        job=job,
        sources={row.idx: read(Source, row) for row in connection.execute(sources_of(shard))},
        parts=tuple(read(PartFile, row) for row in parts),
        previous_output=previous_output(connection, job.id, shard.idx, shard.gen),
        attempt_no=number,
        owner=owner,
    )


def sources_of(shard: Shard) -> sa.Select[Any]:
    """The input files that a shard reads."""
    source, wanted = tables.source, sorted({item.source for item in shard.slices})
    return sa.select(source).where(source.c.job_id == shard.job_id, source.c.idx.in_(wanted))


def previous_output(connection: sa.Connection, job_id: str, idx: int, gen: int) -> PartFile | None:
    """The committed output that a shard of generation ``gen`` builds on: the newest of an earlier generation."""
    shard, part = tables.shard, tables.part_file
    row = connection.execute(
        sa.select(part)
        .join(
            shard,
            sa.and_(
                shard.c.id == part.c.shard_id,
                shard.c.committed_attempt == part.c.attempt_no,
                part.c.seq == OUTPUT_SEQ,
            ),
        )
        .where(shard.c.job_id == job_id, shard.c.idx == idx, shard.c.gen < gen, shard.c.state == ShardState.COMMITTED)
        .order_by(shard.c.gen.desc())
        .limit(1)
    ).first()
    return None if row is None else read(PartFile, row)


def stopping(database: Database, jobs: Collection[str]) -> set[str]:
    """Those of these jobs (ids) that are being wound down."""
    job = tables.job
    query = sa.select(job.c.id).where(job.c.id.in_(list(jobs)), job.c.state == JobState.CANCELLING)
    return set(database.scalars(query))


def heartbeat(
    database: Database, held: Sequence[tuple[str, int]], *, owner: str, lease_seconds: float
) -> Mapping[tuple[str, int], Lease]:
    """Renew the leases on ``held`` (shard id, attempt number) in one statement, and say how each stands."""
    if not held:
        return {}
    shard, job = tables.shard, tables.job
    renewed: dict[tuple[str, int], str] = {}
    with database.write() as connection:
        result: Any = connection.execute(
            shard.update()
            .where(
                shard.c.state == ShardState.RUNNING,
                shard.c.lease_owner == owner,
                sa.tuple_(shard.c.id, shard.c.attempt_no).in_(list(held)),
            )
            .values(lease_until=now() + lease_seconds)
            .returning(shard.c.id, shard.c.attempt_no, shard.c.job_id)
        )
        renewed = {(row.id, row.attempt_no): row.job_id for row in result}
        stopping = set(
            connection.execute(
                sa.select(job.c.id).where(job.c.id.in_(set(renewed.values())), job.c.state == JobState.CANCELLING)
            ).scalars()
        )
    return {
        key: Lease.LOST if key not in renewed else Lease.STOPPING if renewed[key] in stopping else Lease.HELD
        for key in held
    }
