"""Publishing a job's output happens once: the finalizer's epoch fences it, as the attempt number fences a shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.errors import LeaseLost
from storage.queue import plan_leases, schedules
from storage.queue.claims import previous_output, sources_of
from storage.queue.jobs import next_generation
from storage.records import OUTPUT_SEQ, Job, PartFile, Shard, Source
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read
from storage.sql.transitions import move_job, record
from storage.states import TERMINAL_JOB, JobState, ShardState

PUBLISHING, REPUBLISH, FAILED = "finalize.publishing", "finalize.touched", "finalize.failed"
"""Events of the audit trail."""


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """One shard position of a job whose shards have all ended: the newest generation's shard, and its files.

    ``output`` is the committed file, or ``None``; then ``parts`` are what was flushed, and ``previous_output`` the
    committed output of an earlier generation, if any.
    """

    shard: Shard
    output: PartFile | None
    parts: tuple[PartFile, ...]
    previous_output: PartFile | None


@dataclass(frozen=True, slots=True)
class LostOutput:
    """Why a committed file is lost, and whether the previous output is published in its place."""

    error: str
    previous_stands: bool = False


def claim_finalize(database: Database, *, owner: str, lease_seconds: float, job_id: str | None = None) -> Job | None:
    """Take over the publishing of a job whose shards have all ended; ``None`` when there is none to take.

    Also takes an ended job for which :func:`request_republish` was called. Raises the epoch: a finalizer that was
    thought dead can no longer complete the job.

    A job that could not be published is not taken before its time comes again, unless it is asked for by its id; those
    that nobody has tried come first.
    """
    job = tables.job
    newer = job.alias()
    ready = sa.or_(job.c.state == JobState.FINALIZING, sa.and_(job.c.state == JobState.CANCELLING, job.c.n_open == 0))
    overtaken = sa.exists().where(newer.c.output_uri == job.c.output_uri, newer.c.id > job.c.id, newer.c.publishing)
    stands = sa.and_(~job.c.overtaken, job.c.deleted_at.is_(None))
    again = sa.and_(job.c.needs_republish, job.c.state.in_(TERMINAL_JOB), ~overtaken, stands)
    free = sa.or_(job.c.finalize_until.is_(None), job.c.finalize_until < now())
    if job_id is not None:
        free = sa.and_(job.c.id == job_id, sa.or_(job.c.finalize_owner.is_(None), free))
    with database.write() as connection:
        for which in (ready, again):
            query = sa.select(job).where(which, free).order_by(job.c.finalize_until.asc().nulls_first(), job.c.id)
            query = query.limit(1)
            found = connection.execute(database.locked(query, skip=True)).first()
            if found is not None:
                break
        else:
            return None
        connection.execute(
            job.update()
            .where(job.c.id == found.id)
            .values(finalize_epoch=job.c.finalize_epoch + 1, finalize_owner=owner, finalize_until=now() + lease_seconds)
        )
        record(connection, found.id, "finalize.claimed", owner, data={"epoch": found.finalize_epoch + 1})
        return read(Job, connection.execute(sa.select(job).where(job.c.id == found.id)).one())


def request_republish(database: Database, output_uri: str, *, actor: str) -> None:
    """Note that a finalizer which had lost its lease may have disturbed what is published at ``output_uri``.

    No database can fence a delete in an object store. So the job that published there last publishes again: before it
    completes, or after that.
    """
    job = tables.job
    newest = sa.select(job.c.id).where(job.c.output_uri == output_uri, job.c.publishing).order_by(job.c.id.desc())
    with database.write() as connection:
        job_id = connection.execute(newest.limit(1)).scalar()
        if job_id is not None:
            there = (job.c.id == job_id, job.c.deleted_at.is_(None))
            if not connection.execute(job.update().where(*there).values(needs_republish=True)).rowcount:
                return  # it was deleted
            record(connection, job_id, REPUBLISH, actor)


def renew(database: Database, claimed: Job, *, lease_seconds: float) -> None:
    """Keep the finalizer's lease, or :class:`LeaseLost`."""
    with database.write() as connection:
        _update(connection, claimed, finalize_until=now() + lease_seconds)


def give_back(database: Database, claimed: Job, *, delay: float, error: str, actor: str) -> None:
    """Free a job that could not be published: it is tried again in ``delay`` seconds. Raises :class:`LeaseLost`."""
    with database.write() as connection:
        _update(connection, claimed, finalize_owner=None, finalize_until=now() + delay)
        record(connection, claimed.id, FAILED, actor, data={"epoch": claimed.finalize_epoch, "error": error})


def last_failure(database: Database, job_id: str) -> str | None:
    """Why the job could not be published when that was tried last; ``None`` while somebody tries, or nobody has."""
    job, event = tables.job, tables.event
    waits = sa.exists().where(job.c.id == job_id, job.c.finalize_owner.is_(None), job.c.finalize_until.is_not(None))
    query = sa.select(event.c.data).where(event.c.job_id == job_id, event.c.type == FAILED, waits)
    data = database.scalar(query.order_by(event.c.id.desc()).limit(1))
    return None if data is None else str(data["error"])


def begin_publishing(database: Database, claimed: Job, *, actor: str) -> None:
    """Note that this job replaces from now on what is published at its output, or :class:`LeaseLost`."""
    job = tables.job
    # That an ended job is published once more is forgotten only when it is done: this finalizer may die.
    values = {} if claimed.state in TERMINAL_JOB else {"needs_republish": False}
    with database.write() as connection:
        _update(connection, claimed, publishing=True, **values)
        record(connection, claimed.id, PUBLISHING, actor, data={"epoch": claimed.finalize_epoch})
    if claimed.state in TERMINAL_JOB:
        return
    # An earlier job that is publishing here once more has lost the output by now. A transaction of its own: two jobs'
    # rows are never locked in one.
    database.change(
        job.update()
        .where(job.c.output_uri == claimed.output_uri, job.c.id < claimed.id, job.c.finalize_owner.is_not(None))
        .values(finalize_epoch=job.c.finalize_epoch + 1, **plan_leases.FREE)
    )


def _update(connection: sa.Connection, claimed: Job, **values: Any) -> None:
    job = tables.job
    result = connection.execute(
        job.update()
        .where(job.c.id == claimed.id, job.c.finalize_epoch == claimed.finalize_epoch, job.c.state == claimed.state)
        .values(**values)
    )
    if result.rowcount != 1:
        raise LeaseLost(f"another finalizer has taken job {claimed.id}")


def drop_lost_outputs(database: Database, claimed: Job, lost: Mapping[str, LostOutput], *, actor: str) -> Job:
    """Drop committed shards whose files are gone or damaged: ``lost`` maps their ids to what was found.

    Each is followed by a failed shard of the next generation, which a retry of the job computes again: over all its
    rows, or over those that the lost generation had computed, where the output of an earlier one stands. Raises
    :class:`LeaseLost` when another finalizer has taken the job.
    """
    job, shard, part = tables.job, tables.shard, tables.part_file
    with database.write() as connection:
        gen = claimed.gen + 1
        found = connection.execute(sa.select(shard).where(shard.c.id.in_(lost))).all()
        again = {row.id: _afresh(row, gen, lost[row.id]) for row in found}
        taken_back = sum(row.row_n if (rows := again[row.id]["select"]) is None else len(rows) for row in found)
        _update(
            connection,
            claimed,
            gen=gen,
            n_failed_shards=job.c.n_failed_shards + len(found),
            rows_done=job.c.rows_done - taken_back,
            rows_failed=job.c.rows_failed - sum(len(row.failed) for row in found),
            **{name: job.c[name] - sum(getattr(row, name) for row in found) for name in tables.TOKENS},
        )
        for row in found:
            connection.execute(shard.insert().values(**again[row.id]))
            # No later generation is to build on it.
            connection.execute(part.delete().where(part.c.shard_id == row.id, part.c.seq == OUTPUT_SEQ))
            shard_id, error = again[row.id]["id"], lost[row.id].error
            record(connection, claimed.id, "shard.lost", actor, shard_id=shard_id, data={"error": error})
        return read(Job, connection.execute(sa.select(job).where(job.c.id == claimed.id)).one())


def _afresh(row: sa.Row[Any], gen: int, lost: LostOutput) -> dict[str, Any]:
    select = row.select if lost.previous_stands else None
    return next_generation(row, gen) | {"state": ShardState.FAILED, "error": lost.error, "select": select}


def finished_shards(database: Database, job_id: str, *, page: int = 200) -> Iterator[FinishedShard]:
    """Every shard position in row order, a page of them in memory at a time."""
    shard, part = tables.shard, tables.part_file
    newest = (
        sa.select(shard.c.idx, sa.func.max(shard.c.gen).label("gen"))
        .where(shard.c.job_id == job_id)
        .group_by(shard.c.idx)
        .subquery()
    )
    last = sa.and_(shard.c.idx == newest.c.idx, shard.c.gen == newest.c.gen)
    query = sa.select(shard).join(newest, last).where(shard.c.job_id == job_id)
    for found in database.pages(query, shard.c.idx, page):
        with database.read() as connection:
            files: dict[str, list[PartFile]] = {}
            theirs = part.c.shard_id.in_([row.id for row in found])
            for row in connection.execute(sa.select(part).where(theirs).order_by(part.c.attempt_no, part.c.seq)):
                files.setdefault(row.shard_id, []).append(read(PartFile, row))
            previous = {row.id: previous_output(connection, job_id, row.idx, row.gen) for row in found if row.gen > 0}
        for row in found:
            mine = files.get(row.id, [])
            outputs = [file for file in mine if file.seq == OUTPUT_SEQ and file.attempt_no == row.committed_attempt]
            yield FinishedShard(
                shard=read(Shard, row),
                output=outputs[0] if outputs and row.state is ShardState.COMMITTED else None,
                parts=tuple(file for file in mine if file.seq != OUTPUT_SEQ),
                previous_output=previous.get(row.id),
            )


def shard_sources(database: Database, shard: Shard) -> dict[int, Source]:
    """The input files that a shard reads."""
    return {source.idx: source for source in database.records(Source, sources_of(shard))}


def end_state(job: Job) -> JobState:
    """What a job whose shards have all ended will end as, or has ended as."""
    if job.state in TERMINAL_JOB:
        return job.state
    if job.state is JobState.CANCELLING:
        if job.stop_reason in ("cancelled", "expired") and _is_whole(job):
            return JobState.COMPLETED  # stopped too late
        return {"cancelled": JobState.CANCELLED, "expired": JobState.EXPIRED}.get(
            job.stop_reason or "", JobState.FAILED
        )
    return JobState.FAILED if job.n_failed_shards else JobState.COMPLETED


def _is_whole(job: Job) -> bool:
    """Whether every row of the job is done, and no more of them failed than may."""
    few = job.max_failed_rows is None or job.rows_failed <= job.max_failed_rows
    return bool(job.plan) and not job.n_failed_shards and few and job.rows_done == job.rows_total


def complete(database: Database, claimed: Job, target: JobState, *, actor: str, error: str | None = None) -> Job | None:
    """End the job, if this finalizer is still the one: else :class:`LeaseLost`.

    ``None``, and the job goes on, when :func:`request_republish` was called meanwhile: it must be published again.
    """
    job = tables.job
    with database.write() as connection:
        found = connection.execute(database.locked(sa.select(job).where(job.c.id == claimed.id))).one()
        if found.finalize_epoch != claimed.finalize_epoch or found.state != claimed.state:
            raise LeaseLost(f"job {claimed.id} moved on while it was being published")
        if found.needs_republish and found.publishing and _republish_requested_since(connection, claimed.id):
            return None
        values: dict[str, Any] = {**plan_leases.FREE, "needs_republish": False}
        if claimed.state in TERMINAL_JOB:
            _update(connection, claimed, **values)
        else:
            values |= {"ended_at": now()} if error is None else {"ended_at": now(), "error": error}
            if target is JobState.COMPLETED:
                values |= {"stop_reason": None, "cancel_requested_at": None}
            move_job(connection, claimed.id, claimed.state, target, actor, **values)
            if target is JobState.COMPLETED:
                schedules.mark_processed(connection, claimed.id)
        return read(Job, connection.execute(sa.select(job).where(job.c.id == claimed.id)).one())


def _republish_requested_since(connection: sa.Connection, job_id: str) -> bool:
    """Whether it was asked to publish again after somebody began to publish it, the last time that one did."""
    event = tables.event
    query = sa.select(event.c.type).where(event.c.job_id == job_id, event.c.type.in_((REPUBLISH, PUBLISHING)))
    return connection.execute(query.order_by(event.c.id.desc()).limit(1)).scalar() == REPUBLISH


def first_failed_shard(database: Database, job_id: str) -> Shard | None:
    """The first failed shard, if any: its error is the job's."""
    shard = tables.shard
    query = sa.select(shard).where(shard.c.job_id == job_id, shard.c.state == ShardState.FAILED).order_by(shard.c.idx)
    return database.record(Shard, query.limit(1))


def all_sources(database: Database, job_id: str) -> list[Source]:
    """The job's input files, in row order; not the copies that hold their rows in another order."""
    table = tables.source
    query = sa.select(table).where(table.c.job_id == job_id, table.c.rows.is_(None)).order_by(table.c.idx)
    return database.records(Source, query)


def engine_facts(database: Database, job_id: str) -> list[dict[str, Any]]:
    """What the engines of the committed attempts said of themselves, each distinct statement once."""
    shard, attempt = tables.shard, tables.attempt
    won = sa.and_(shard.c.id == attempt.c.shard_id, shard.c.committed_attempt == attempt.c.attempt_no)
    query = sa.select(attempt.c.stats).join(shard, won).where(shard.c.job_id == job_id)
    return [stats.get("engine", {}) for stats in database.scalars(query)]
