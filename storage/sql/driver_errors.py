"""Errors of the database drivers as our own."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from storage.errors import CorruptDatabase, InvalidSettings, RowmillError, TransientError, Unreachable

BUSY_SECONDS = 60
"""How long SQLite waits for another process's transaction."""
_RETRYABLE_SQLSTATES = ("40001", "40P01", "55P03")
_PG_GONE = ("08", "53", "57")
"""Classes of SQLSTATE: connection failure, out of resources, shut down by an operator."""
_PG_REFUSED = ("28", "3D", "42501")
"""SQLSTATEs of a wrong password, a database that is not there, and a missing right."""
_SQLITE_GONE = ("SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_FULL", "SQLITE_PROTOCOL", "SQLITE_NOLFS")
_SQLITE_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT")


def explained(error: DBAPIError | sqlite3.Error, place: str, *, sqlite: bool) -> RowmillError | None:
    """Our error for one of the driver's; ``None`` for one that tells of a wrong statement.

    ``place`` is what people call the database: SQLite's file.
    """
    cause = error.orig if isinstance(error, DBAPIError) else error
    if sqlite:
        return _of_sqlite(error, getattr(cause, "sqlite_errorname", None) or "", place)
    sqlstate = getattr(cause, "sqlstate", None)
    if sqlstate in _RETRYABLE_SQLSTATES:
        return TransientError(f"the database is busy: {reason(error)}")
    gone = isinstance(error, sa.exc.OperationalError) and (sqlstate is None or sqlstate[:2] in _PG_GONE)
    if gone or getattr(error, "connection_invalidated", False):
        return Unreachable(f"the database at {place} does not answer: {reason(error)}")
    if sqlstate is not None and sqlstate.startswith(_PG_REFUSED):
        return Unreachable(f"the database at {place} refuses the connection: {reason(error)}")
    if sqlstate is None and isinstance(error, (sa.exc.NotSupportedError, sa.exc.ProgrammingError)):
        # The driver's own words, before anything was asked of the server: an encoding that it does not know.
        return InvalidSettings(f"PostgreSQL's client cannot use it: {reason(error)}", field="database_url")
    return None


def _of_sqlite(error: DBAPIError | sqlite3.Error, code: str, place: str) -> RowmillError | None:
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return TransientError(f"the database is busy: {place} was locked by another process for {BUSY_SECONDS} s")
    if code.startswith(("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH")):
        return Unreachable(
            f"the database file {place} cannot be written ({reason(error)}); correct its permissions, or set "
            "data_dir to a folder that can be written"
        )
    if code.startswith(_SQLITE_GONE):
        return Unreachable(f"the database file {place} cannot be used: {reason(error)}")
    if code.startswith(_SQLITE_DAMAGED):
        return CorruptDatabase(place, reason(error))
    if isinstance(error, (sa.exc.IntegrityError, sqlite3.IntegrityError)):
        return None
    found = damage(place)
    return None if found is None else CorruptDatabase(place, found)


def damage(file: str) -> str | None:
    """What SQLite's own check finds wrong with a database file; ``None`` when nothing is."""
    try:
        with closing(sqlite3.connect(f"{Path(file).absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except (sqlite3.Error, UnicodeError) as error:
        return _first_line(error)
    return None if found is None or found[0] == "ok" else str(found[0]).splitlines()[-1]


def reason(error: DBAPIError | sqlite3.Error) -> str:
    """What the driver says, in one line."""
    return _first_line((error.orig if isinstance(error, DBAPIError) else None) or error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
