"""A job's own transitions up to the end of its planning, winding down, and reading it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage.errors import Conflict, IllegalTransition, NotFound
from storage.queue import plan_leases, schedules
from storage.queue.schedules import ConsumedFiles
from storage.records import Event, FireKey, Job, NewJob, ShardPlan, Source
from storage.sql import row_mapping, tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read
from storage.sql.transitions import move_job, record
from storage.states import TERMINAL_JOB, JobState, ShardState
from storage.tenants import quotas

T = TypeVar("T")
_CHUNK = 500


def shard_id(job_id: str, gen: int, idx: int) -> str:
    """Deterministic, and sorts in row order within a job: planning twice makes the same shards."""
    return f"{job_id}.{gen:02d}.{idx:07d}"


def next_generation(row: sa.Row[Any], gen: int) -> dict[str, Any]:
    """A ready shard of generation ``gen`` in the place of the committed shard ``row``, over all of its rows."""
    kept = ("job_id", "idx", "tenant", "queue", "priority", "engine_key", "row_start", "row_n", "slices")
    fresh = {"id": shard_id(row.job_id, gen, row.idx), "gen": gen, "state": ShardState.READY}
    return fresh | {name: getattr(row, name) for name in kept}


def insert(
    database: Database,
    new: NewJob,
    *,
    window_seconds: float,
    actor: str,
    new_tenant: bool = True,
    fire: FireKey | None = None,
) -> Job:
    """Insert a job in state ``validating``. Same tenant and key: the job that is there already, or :class:`Conflict`.

    Raises :class:`Conflict` when a live job already writes to its output, or when the key was used for other work,
    :class:`~storage.errors.QuotaExceeded` when the tenant has used up what it may, and
    :class:`~storage.errors.InvalidJob` when it is unknown and not to be made (``new_tenant``). With ``fire``, that fire
    of a schedule is marked as submitted in the same transaction; raises :class:`IllegalTransition`, and inserts
    nothing, when it is not pending any more.
    """
    values = row_mapping.values(new) | {"state": JobState.VALIDATING, "spec": dict(new.spec)}
    try:
        with database.write() as connection:
            if fire is not None:
                schedules.lock_fire(connection, database, fire)
            existing = by_idempotency_key(connection, new.tenant, new.idempotency_key)
            if existing is None:
                connection.execute(
                    tables.job.insert().values(**values, created_at=now(), expires_at=now() + window_seconds)
                )
                record(connection, new.id, f"job.{JobState.VALIDATING}", actor)
                if fire is not None:
                    schedules.mark_submitted(connection, fire, new.id)
                quotas.admit_job(database, connection, new.tenant, create=new_tenant)
    except IntegrityError:
        with database.read() as connection:
            existing = by_idempotency_key(connection, new.tenant, new.idempotency_key)
        if existing is None:
            live = live_on_output(database, new.output_uri)
            holder = f"job {live.id} ({live.state})" if live else "another job"
            raise Conflict(
                f"{new.output_uri} is being written by {holder}; wait for it, cancel it, or choose another output",
                field="output",
            ) from None
    if existing is not None and existing.spec_hash != new.spec_hash:
        raise Conflict(
            f"the key {new.idempotency_key!r} belongs to job {existing.id}, which does other work; use a new key",
            field="idempotency_key",
        )
    return existing or get(database, new.id)


def by_idempotency_key(connection: sa.Connection, tenant: str, key: str | None) -> Job | None:
    """The tenant's job under this key, if any."""
    if key is None:
        return None
    job = tables.job
    row = connection.execute(sa.select(job).where(job.c.tenant == tenant, job.c.idempotency_key == key)).first()
    return None if row is None else read(Job, row)


def has_key(database: Database, tenant: str, key: str | None) -> bool:
    """Whether the tenant has a job under this key."""
    with database.read() as connection:
        return by_idempotency_key(connection, tenant, key) is not None


def live_on_output(database: Database, output_uri: str) -> Job | None:
    """The job that is writing to ``output_uri`` now, if any."""
    job = tables.job
    query = sa.select(job).where(job.c.output_uri == output_uri, job.c.state.not_in(TERMINAL_JOB))
    return database.record(Job, query)


def newest_on_output(database: Database, output_uri: str) -> Job | None:
    """The job that was the last to write to ``output_uri``, whatever became of it."""
    job = tables.job
    mine = (job.c.output_uri == output_uri, job.c.deleted_at.is_(None))
    return database.record(Job, sa.select(job).where(*mine).order_by(job.c.id.desc()).limit(1))


def set_planned(
    database: Database,
    job_id: str,
    *,
    plan: Mapping[str, Any],
    sources: Iterable[Source],
    shards: Iterable[ShardPlan],
    actor: str,
    consumed: ConsumedFiles | None = None,
) -> Job:
    """Store the plan and its shards, and queue the job: one transaction, so a job is planned or not, never half.

    A job without rows goes straight to ``finalizing``. Raises :class:`IllegalTransition` when somebody was faster, and
    :class:`~storage.errors.QuotaExceeded` when its rows are more than the tenant may have today.
    """
    with database.write() as connection:
        found = connection.execute(database.locked(sa.select(tables.job).where(tables.job.c.id == job_id))).one()
        if found.state != JobState.VALIDATING:
            raise IllegalTransition("job", found.state, JobState.QUEUED, "it is planned already")
        for chunk in _chunks(sources):
            of_job = [
                row_mapping.values(item) | {"job_id": job_id, "partition": dict(item.partition)} for item in chunk
            ]
            row_mapping.insert(connection, tables.source, of_job)
        if consumed is not None:
            schedules.note_consumed(connection, job_id, consumed)
        n_shards = rows_total = 0
        due = connection.execute(sa.select(now())).scalar_one()
        for part in _chunks(shards):
            row_mapping.insert(connection, tables.shard, [_shard_values(found, item, due) for item in part])
            n_shards += len(part)
            rows_total += sum(item.row_n for item in part)
        # Only now: the tenant's row is locked, and claims and submits of the tenant wait, until this transaction ends.
        quotas.admit_rows(database, connection, found.tenant, rows_total)
        counts = {"n_shards": n_shards, "n_open": n_shards, "rows_total": rows_total}
        # The error says why an earlier try at planning it had to wait.
        values = {"plan": dict(plan), "error": None, "n_lost": 0, **counts, **plan_leases.FREE}
        data = {"shards": n_shards, "rows": rows_total}
        move_job(connection, job_id, JobState.VALIDATING, JobState.QUEUED, actor, data=data, **values)
        if n_shards == 0:
            move_job(connection, job_id, JobState.QUEUED, JobState.FINALIZING, actor, started_at=now())
    return get(database, job_id)


def _shard_values(job: sa.Row[Any], item: ShardPlan, due: float) -> dict[str, Any]:
    of_job = {"job_id": job.id, **{name: getattr(job, name) for name in ("tenant", "queue", "priority", "engine_key")}}
    rows = {"row_start": item.row_start, "row_n": item.row_n, "slices": item.slices}
    fresh = {"id": shard_id(job.id, 0, item.idx), "gen": 0, "idx": item.idx, "run_after": due}
    return of_job | rows | fresh | {"state": ShardState.READY}


def refuse(database: Database, job_id: str, error: str, *, actor: str) -> None:
    """End a job whose planning found it unusable."""
    with database.write() as connection:
        values = {"error": error, "ended_at": now(), **plan_leases.FREE}
        move_job(connection, job_id, JobState.VALIDATING, JobState.FAILED, actor, data={"error": error}, **values)


def request_stop(database: Database, job_id: str, reason: str, *, actor: str) -> Job:
    """Begin to wind a job down: ``reason`` is ``"cancelled"`` or ``"expired"``. Works with no worker alive.

    Its ready shards are cancelled at once, in batches; running ones see it at their next heartbeat. Asking twice is
    harmless. A job whose shards have all ended is left unchanged: there is nothing to stop, and it is published. Raises
    :class:`IllegalTransition` when the job has ended.
    """
    with database.write() as connection:
        query = sa.select(tables.job.c.state).where(tables.job.c.id == job_id)
        found = connection.execute(database.locked(query)).first()
        if found is None:
            raise NotFound(f"there is no job {job_id}")
        state = found.state
        if state in TERMINAL_JOB:
            raise IllegalTransition("job", state, JobState.CANCELLING, "it has ended, there is nothing to stop")
        if state not in (JobState.CANCELLING, JobState.FINALIZING):
            # A planner that is at work finds the job gone; whoever publishes it need not wait for its lease.
            values = {"stop_reason": reason, "cancel_requested_at": now(), **plan_leases.FREE}
            move_job(connection, job_id, state, JobState.CANCELLING, actor, data={"reason": reason}, **values)
    while cancel_ready(database, job_id, actor=actor):
        pass
    return get(database, job_id)


def cancel_ready(database: Database, job_id: str, *, actor: str, batch: int = 1000) -> int:
    """Cancel up to ``batch`` ready shards of a job that is being wound down (of any other: none); returns how many."""
    shard, job = tables.shard, tables.job
    with database.write() as connection:
        # Under the lock: since somebody saw it being wound down it may have ended, and been queued again by a retry.
        found = connection.execute(database.locked(sa.select(job.c.state).where(job.c.id == job_id))).one()
        if found.state != JobState.CANCELLING:
            return 0
        query = (
            sa.select(shard.c.id)
            .where(shard.c.job_id == job_id, shard.c.state == ShardState.READY)
            .order_by(shard.c.id)
            .limit(batch)
        )
        ids = list(connection.execute(database.locked(query, skip=True)).scalars())
        if not ids:
            return 0
        at = connection.execute(sa.select(now())).scalar_one()
        connection.execute(shard.update().where(shard.c.id.in_(ids)).values(state=ShardState.CANCELLED))
        connection.execute(job.update().where(job.c.id == job_id).values(n_open=job.c.n_open - len(ids)))
        kind = f"shard.{ShardState.CANCELLED}"
        event = {"job_id": job_id, "type": kind, "at": at, "actor": actor, "data": {}}
        row_mapping.insert(connection, tables.event, [event | {"shard_id": item} for item in ids])
        return len(ids)


def get(database: Database, job_id: str) -> Job:
    """The job, or :class:`NotFound`."""
    job = tables.job
    found = database.record(Job, sa.select(job).where(job.c.id == job_id, job.c.deleted_at.is_(None)))
    if found is None:
        raise NotFound(f"there is no job {job_id}")
    return found


def expired(database: Database) -> list[str]:
    """Ids of live jobs whose completion window has passed."""
    job = tables.job
    ending = (*TERMINAL_JOB, JobState.CANCELLING, JobState.FINALIZING)
    query = sa.select(job.c.id).where(job.c.state.not_in(ending), job.c.expires_at < now())
    return database.scalars(query)


def events(database: Database, job_id: str) -> list[Event]:
    """The job's audit trail, oldest first."""
    table = tables.event
    return database.records(Event, sa.select(table).where(table.c.job_id == job_id).order_by(table.c.id))


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
