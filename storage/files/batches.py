"""Batches in SQL: created once, driven under a lease, moved between states by compare-and-set."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage.errors import Conflict, IllegalTransition, LeaseLost, NotFound
from storage.files import files
from storage.files.paging import page
from storage.files.records import Batch, NewBatch, NewFile, Purpose
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read, values
from storage.states import TERMINAL_BATCH, BatchState, check

REPEATED_SECONDS = 600.0
"""A client repeats a request that was not answered within this time."""


def create(database: Database, new: NewBatch, *, window_seconds: float, repeated: bool = False) -> Batch:
    """A new batch in ``validating``; or the one that an earlier request with the same key and body created.

    ``repeated``: the client says that it sent the same request before; then the batch of that one, if there is one.
    Raises :class:`Conflict` for an ``idem_key`` of another body.
    """
    try:
        with database.write() as connection:
            if not database.sqlite:  # SQLite has one writer; here the first request may still be under way
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(new.body_hash, 0))))
            found = _created(connection, new, repeated=repeated)
            if found is None:
                at = connection.execute(sa.select(now())).scalar_one()
                given = values(new) | {"state": BatchState.VALIDATING, "created_at": at}
                connection.execute(tables.batch.insert().values(**given, expires_at=at + window_seconds))
    except IntegrityError:
        with database.read() as connection:
            found = _created(connection, new, repeated=False)
        if found is None:
            raise
    if found is not None and found.body_hash != new.body_hash:
        raise Conflict(
            f"the idempotency key {new.idem_key!r} belongs to batch {found.id}, which was created with another body; "
            "use a new key",
            field="idempotency_key",
        )
    return found or get(database, new.tenant, new.id)


def _created(connection: sa.Connection, new: NewBatch, *, repeated: bool) -> Batch | None:
    table = tables.batch
    query = sa.select(table).where(table.c.tenant == new.tenant)
    if new.idem_key is not None:
        query = query.where(table.c.idem_key == new.idem_key)
    elif repeated:
        # Comparing with None makes IS NULL of it.
        same = (table.c.body_hash == new.body_hash, table.c.idem_key.is_(None), table.c.key_id == new.key_id)
        query = query.where(*same, table.c.created_at >= now() - REPEATED_SECONDS)
    else:
        return None
    row = connection.execute(query.order_by(table.c.created_at.desc()).limit(1)).first()
    return None if row is None else read(Batch, row)


def get(database: Database, tenant: str, batch_id: str) -> Batch:
    """The tenant's batch, or :class:`NotFound`."""
    table = tables.batch
    found = database.record(Batch, sa.select(table).where(table.c.id == batch_id, table.c.tenant == tenant))
    if found is None:
        raise NotFound(f"No such Batch object: {batch_id}")
    return found


def listed(database: Database, tenant: str, *, limit: int, after: str | None) -> tuple[list[Batch], bool]:
    """The tenant's batches, newest first, and whether there are more. Raises :class:`NotFound` for an unknown
    ``after``."""
    with database.read() as connection:
        rows, more = page(connection, tables.batch, (), tenant=tenant, limit=limit, after=after)
    return [read(Batch, row) for row in rows], more


def request_cancel(database: Database, tenant: str, batch_id: str) -> Batch:
    """The batch, which is being cancelled from now on; unchanged where it was already.

    Raises :class:`NotFound`, and :class:`IllegalTransition` for one that has ended otherwise.
    """
    table = tables.batch
    with database.write() as connection:
        mine = sa.select(table).where(table.c.id == batch_id, table.c.tenant == tenant)
        row = connection.execute(database.locked(mine)).first()
        if row is None:
            raise NotFound(f"No such Batch object: {batch_id}")
        if row.state not in (BatchState.CANCELLING, BatchState.CANCELLED):
            _move(connection, batch_id, row.state, BatchState.CANCELLING)
    return get(database, tenant, batch_id)


def live(database: Database, *, after: str = "", limit: int = 200) -> list[Batch]:
    """Batches of all tenants that have not ended, by id, beyond ``after``."""
    table = tables.batch
    query = sa.select(table).where(table.c.state.not_in(TERMINAL_BATCH), table.c.id > after)
    return database.records(Batch, query.order_by(table.c.id).limit(limit))


def take(database: Database, batch: Batch, *, owner: str, lease_seconds: float) -> bool:
    """Whether ``owner`` holds the batch from now on: nobody else does, and it is in the state that it was read in."""
    table = tables.batch
    free = sa.or_(table.c.lease_until.is_(None), table.c.lease_until <= now())
    same = (table.c.id == batch.id, table.c.state == batch.state)
    lease = {"lease_owner": owner, "lease_until": now() + lease_seconds}
    return database.change(table.update().where(*same, free).values(**lease)) == 1


def renew(database: Database, batch_id: str, *, owner: str, lease_seconds: float) -> None:
    """Keep the lease. Raises :class:`LeaseLost`."""
    _update_leased(database, batch_id, owner, lease_until=now() + lease_seconds)


def release(database: Database, batch_id: str, *, owner: str) -> None:
    """Let go of the batch. Whoever lost its lease has nothing to let go of."""
    table = tables.batch
    mine = (table.c.id == batch_id, table.c.lease_owner == owner)
    database.change(table.update().where(*mine).values(lease_owner=None, lease_until=None))


def free_leases(database: Database, owners: list[str]) -> None:
    """Free what processes held that are known to have ended."""
    table = tables.batch
    database.change(table.update().where(table.c.lease_owner.in_(owners)).values(lease_owner=None, lease_until=None))


def set_job(database: Database, batch_id: str, *, owner: str, job_id: str, model: str, n_total: int) -> None:
    """The batch's file is valid, and this job computes it. Raises :class:`LeaseLost`."""
    _update_leased(database, batch_id, owner, job_id=job_id, model=model, n_total=n_total)


def move(database: Database, batch: Batch, target: BatchState, **values: Any) -> None:
    """Move a batch on from the state that it was read in. Raises :class:`IllegalTransition` where it has moved."""
    with database.write() as connection:
        _move(connection, batch.id, batch.state, target, **values)


def end(
    database: Database,
    batch: Batch,
    target: BatchState,
    *,
    output: NewFile | None,
    errors: NewFile | None,
    **values: Any,
) -> None:
    """End a batch and record what it wrote, in one transaction. Raises :class:`IllegalTransition` where it has moved:
    then nothing is recorded."""
    with database.write() as connection:
        _move(
            connection,
            batch.id,
            batch.state,
            target,
            output_file_id=None if output is None else output.id,
            error_file_id=None if errors is None else errors.id,
            lease_owner=None,
            lease_until=None,
            **values,
        )
        for new in (output, errors):
            if new is not None:
                files.insert(connection, batch.tenant, new, purpose=Purpose.BATCH_OUTPUT, seconds=batch.output_seconds)


def _move(connection: sa.Connection, batch_id: str, source: BatchState, target: BatchState, **values: Any) -> None:
    check(source, target)
    table = tables.batch
    values[f"{target}_at"] = now()
    result = connection.execute(
        table.update().where(table.c.id == batch_id, table.c.state == source).values(state=target, **values)
    )
    if result.rowcount != 1:
        raise IllegalTransition("batch", source, target, "it has moved on")


def _update_leased(database: Database, batch_id: str, owner: str, **values: Any) -> None:
    table = tables.batch
    mine = (table.c.id == batch_id, table.c.lease_owner == owner)
    if database.change(table.update().where(*mine).values(**values)) != 1:
        raise LeaseLost(f"batch {batch_id} is driven by another process now")
