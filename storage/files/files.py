"""Files of the gateway: each belongs to a tenant, and no query leaves that out."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from storage.errors import LeaseLost, NotFound
from storage.files import records
from storage.files.paging import page
from storage.files.records import File, NewFile, Purpose
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import values
from storage.states import TERMINAL_BATCH

ABANDONED_SECONDS = 86_400.0
"""An upload that has not ended after this long never will."""


def begin(database: Database, *, file_id: str, tenant: str, purpose: Purpose, uri: str) -> None:
    """Record that a file is being uploaded to ``uri``: nobody sees it before :func:`finish`."""
    values = {"id": file_id, "tenant": tenant, "purpose": purpose, "filename": "", "uri": uri}
    database.change(tables.file.insert().values(**values, created_at=now()))


def finish(
    database: Database, file_id: str, *, tenant: str, filename: str, n_bytes: int, seconds: float | None
) -> File:
    """The file's content is there: from now on it is seen, for ``seconds`` after its creation (``None``: for ever).

    Raises :class:`LeaseLost` where the upload took so long that it was given up.
    """
    table = tables.file
    with database.write() as connection:
        result = connection.execute(
            table.update()
            .where(table.c.id == file_id, table.c.tenant == tenant, table.c.stored_at.is_(None))
            .where(table.c.deleted_at.is_(None))
            .values(
                filename=filename,
                n_bytes=n_bytes,
                stored_at=now(),
                expires_at=None if seconds is None else table.c.created_at + seconds,
            )
        )
        if result.rowcount != 1:
            raise LeaseLost(f"the upload of file {file_id} took too long and was given up")
        return records.file(connection.execute(sa.select(table).where(table.c.id == file_id)).one())


def abandon(database: Database, file_id: str) -> None:
    """Forget an upload that did not end well; its content is gone already."""
    table = tables.file
    database.change(table.delete().where(table.c.id == file_id, table.c.stored_at.is_(None)))


def insert(connection: sa.Connection, tenant: str, new: NewFile, *, purpose: Purpose, seconds: float | None) -> None:
    """Record a file whose content is there, within a transaction of the caller's."""
    at = connection.execute(sa.select(now())).scalar_one()
    connection.execute(
        tables.file.insert().values(
            **values(new),
            tenant=tenant,
            purpose=purpose,
            created_at=at,
            stored_at=at,
            expires_at=None if seconds is None else at + seconds,
        )
    )


def get(database: Database, tenant: str, file_id: str) -> File:
    """The tenant's file. Raises :class:`NotFound` for one that is not there, was deleted, or has expired."""
    table = tables.file
    row = database.row(sa.select(table).where(table.c.id == file_id, table.c.tenant == tenant, *_seen()))
    if row is None:
        raise NotFound(f"No such File object: {file_id}")
    return records.file(row)


def content(database: Database, tenant: str, file_id: str) -> File | None:
    """The file that a batch of the tenant reads, also where it was deleted after the batch was created."""
    table = tables.file
    query = sa.select(table).where(table.c.id == file_id, table.c.tenant == tenant, table.c.stored_at.is_not(None))
    row = database.row(query)
    return None if row is None else records.file(row)


def listed(
    database: Database,
    tenant: str,
    *,
    purpose: str | None,
    limit: int,
    after: str | None,
    newest_first: bool,
) -> tuple[list[File], bool]:
    """One page of the tenant's files, and whether there are more. Raises :class:`NotFound` for an unknown ``after``."""
    where = list(_seen())
    if purpose is not None:
        where.append(tables.file.c.purpose == purpose)
    with database.read() as connection:
        rows, more = page(
            connection, tables.file, where, tenant=tenant, limit=limit, after=after, newest_first=newest_first
        )
    return [records.file(row) for row in rows], more


def delete(database: Database, tenant: str, file_id: str) -> None:
    """Nobody sees the file any more; its content goes once no live batch reads it. Raises :class:`NotFound`."""
    table = tables.file
    mine = (table.c.id == file_id, table.c.tenant == tenant)
    if database.change(table.update().where(*mine, *_seen()).values(deleted_at=now())) != 1:
        raise NotFound(f"No such File object: {file_id}")


def useless(database: Database, limit: int = 100) -> list[File]:
    """Files whose content may go: deleted, expired or abandoned ones that no live batch reads."""
    table, batch = tables.file, tables.batch
    gone = sa.or_(
        table.c.deleted_at.is_not(None),
        table.c.expires_at <= now(),
        sa.and_(table.c.stored_at.is_(None), table.c.created_at <= now() - ABANDONED_SECONDS),
    )
    read = sa.exists().where(batch.c.input_file_id == table.c.id, batch.c.state.not_in(TERMINAL_BATCH))
    query = sa.select(table).where(gone, ~read).order_by(table.c.id).limit(limit)
    return [records.file(row) for row in database.rows(query)]


def forget(database: Database, found: Sequence[File]) -> None:
    """Their content is gone."""
    table = tables.file
    database.change(table.delete().where(table.c.id.in_([item.id for item in found])))


def _seen() -> tuple[sa.ColumnElement[bool], ...]:
    table = tables.file
    return (
        table.c.stored_at.is_not(None),
        table.c.deleted_at.is_(None),
        sa.or_(table.c.expires_at.is_(None), table.c.expires_at > now()),
    )
