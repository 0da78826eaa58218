"""Reading for people: counts, attempts, failed rows, and where one row stands."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from storage.deaths import Step
from storage.errors import NotFound
from storage.queue import regrouped_rows
from storage.records import Attempt, Job, PartFile, RowException, Shard
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read
from storage.states import AttemptState, ShardState


@dataclass(frozen=True, slots=True)
class Progress:
    """Sums over a job's shards. ``rows_done`` includes failed rows, and what running shards have flushed.

    ``running`` attempts are at work; ``loading`` of them wait for an engine, the first for ``loading_seconds``.
    ``seconds`` have passed since anything of the job began or ended, by the database's clock.
    """

    rows_done: int
    rows_failed: int
    tokens: dict[str, int]
    shards: dict[str, int]
    attempts: int
    failures: int
    losses: int
    rows_resumed: int
    running: int
    loading: int
    loading_seconds: float
    seconds: float


def progress(database: Database, job: Job) -> Progress:
    """Where the job stands now."""
    shard, attempt = tables.shard, tables.attempt
    names = tables.TOKENS
    sums = [sa.func.coalesce(sa.func.sum(shard.c[name]), 0).label(name) for name in ("n_done", "n_failed", *names)]
    with database.read() as connection:
        counts = {
            row.state: row
            for row in connection.execute(
                sa.select(shard.c.state, sa.func.count().label("n"), *sums)
                .where(shard.c.job_id == job.id)
                .group_by(shard.c.state)
            )
        }
        tried = connection.execute(
            sa.select(
                sa.func.count().label("n"),
                sa.func.count().filter(attempt.c.state == AttemptState.FAILED).label("failed"),
                sa.func.count().filter(attempt.c.state == AttemptState.LOST).label("lost"),
                sa.func.coalesce(sa.func.sum(attempt.c.rows_resumed), 0).label("resumed"),
                sa.func.max(attempt.c.ended_at).label("ended"),
            )
            .join(shard, shard.c.id == attempt.c.shard_id)
            .where(shard.c.job_id == job.id)
        ).one()
        at_work = connection.execute(_at_work(job.id)).one()
        moved = max(
            at for at in (job.created_at, job.started_at, tried.ended, job.cancel_requested_at) if at is not None
        )
    unsettled = [row for state, row in counts.items() if state != ShardState.COMMITTED]
    return Progress(
        rows_done=job.rows_done + sum(int(row.n_done) for row in unsettled),
        rows_failed=job.rows_failed + sum(int(row.n_failed) for row in unsettled),
        tokens={name: job.tokens[name] + sum(int(getattr(row, name)) for row in unsettled) for name in names},
        shards={state: int(row.n) for state, row in counts.items()},
        attempts=int(tried.n),
        failures=int(tried.failed),
        losses=int(tried.lost),
        rows_resumed=int(tried.resumed),
        running=int(at_work.n),
        loading=int(at_work.loading),
        loading_seconds=max(0.0, at_work.clock - at_work.since) if at_work.since is not None else 0.0,
        seconds=max(0.0, at_work.clock - moved),
    )


def _at_work(job_id: str) -> sa.Executable:
    """Attempts at the job that are running, those among them that load, and when the first of these began."""
    shard, attempt = tables.shard, tables.attempt
    loads = attempt.c.step == Step.LOADING
    return (
        sa.select(
            sa.func.count().label("n"),
            sa.func.count().filter(loads).label("loading"),
            sa.func.min(attempt.c.started_at).filter(loads).label("since"),
            sa.cast(now(), sa.Double()).label("clock"),
        )
        .select_from(attempt)
        .join(shard, sa.and_(shard.c.id == attempt.c.shard_id, shard.c.attempt_no == attempt.c.attempt_no))
        .where(shard.c.job_id == job_id, shard.c.state == ShardState.RUNNING)
    )


def measured(database: Database, job_id: str) -> list[tuple[dict[str, float], float]]:
    """What each attempt at the job's shards measured, where it came to say so; and when it ended (Unix seconds)."""
    attempt, shard = tables.attempt, tables.shard
    query = (
        sa.select(attempt.c.stats, attempt.c.ended_at)
        .join(shard, shard.c.id == attempt.c.shard_id)
        .where(shard.c.job_id == job_id, attempt.c.ended_at.is_not(None))
        .order_by(attempt.c.shard_id, attempt.c.attempt_no)
    )
    return [(row.stats["measured"], row.ended_at) for row in database.rows(query) if "measured" in row.stats]


def attempts(database: Database, job_id: str) -> list[Attempt]:
    """Every attempt at the job's shards, by shard and number."""
    attempt, shard = tables.attempt, tables.shard
    query = sa.select(attempt).join(shard, shard.c.id == attempt.c.shard_id).where(shard.c.job_id == job_id)
    return database.records(Attempt, query.order_by(attempt.c.shard_id, attempt.c.attempt_no))


def attempt(database: Database, shard_id: str, attempt_no: int) -> Attempt:
    """One attempt."""
    table = tables.attempt
    query = sa.select(table).where(table.c.shard_id == shard_id, table.c.attempt_no == attempt_no)
    [found] = database.records(Attempt, query)
    return found


def shards(database: Database, job_id: str, *, state: ShardState | None = None) -> list[Shard]:
    """The job's shards in row order, all generations; ``state`` narrows them."""
    table = tables.shard
    query = sa.select(table).where(table.c.job_id == job_id).order_by(table.c.idx, table.c.gen)
    if state is not None:
        query = query.where(table.c.state == state)
    return database.records(Shard, query)


@dataclass(frozen=True, slots=True)
class RowLocation:
    """Where one row of a job lives: its shard (newest generation), its index in it, and the file that holds it."""

    shard: Shard
    row: int
    part: PartFile | None
    exception: RowException | None


def locate_row(database: Database, job: Job, row: int) -> RowLocation:
    """One look-up for any row of a job. Raises :class:`NotFound` when the job has no such row."""
    if not 0 <= row < job.rows_total:
        raise NotFound(f"job {job.id} has rows 0 to {job.rows_total - 1}, not {row}")
    table, part, exception = tables.shard, tables.part_file, tables.row_exception
    at = regrouped_rows.position(database, job.id, row)
    with database.read() as connection:
        generations = connection.execute(
            sa.select(table)
            .where(table.c.job_id == job.id, table.c.row_start <= at, table.c.row_start + table.c.row_n > at)
            .order_by(table.c.gen.desc())
        ).all()
        shards = [read(Shard, item) for item in generations]
        index = at - shards[0].row_start
        # The newest generation that has this row among its own.
        shard = next((s for s in shards if s.select is None or index in s.select), shards[-1])
        parts = sa.select(part).where(part.c.shard_id == shard.id).order_by(part.c.attempt_no.desc(), part.c.seq.desc())
        files = [read(PartFile, item) for item in connection.execute(parts)]
        detail = connection.execute(
            sa.select(exception).where(exception.c.shard_id == shard.id, exception.c.row_idx == index)
        ).first()
    return RowLocation(
        shard=shard,
        row=index,
        part=next((item for item in files if index in item.rows), None),
        exception=None if detail is None else RowException(row, detail.code, detail.message),
    )


def ready_shards(database: Database) -> dict[str, int]:
    """Ready shards by queue."""
    shard = tables.shard
    query = sa.select(shard.c.queue, sa.func.count()).where(shard.c.state == ShardState.READY).group_by(shard.c.queue)
    return {queue: int(count) for queue, count in database.rows(query)}


def shards_by_queue(database: Database) -> dict[str, dict[str, int]]:
    """How many shards each queue has in each state."""
    shard = tables.shard
    query = sa.select(shard.c.queue, shard.c.state, sa.func.count()).group_by(shard.c.queue, shard.c.state)
    found: dict[str, dict[str, int]] = {}
    for queue, state, count in database.rows(query):
        found.setdefault(queue, {})[state] = int(count)
    return found
