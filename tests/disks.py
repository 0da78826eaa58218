"""Nothing that a test starts loses power, so nothing waits until the disk has it: tests kill processes alone."""

from __future__ import annotations

import os

import sqlalchemy as sa

from storage.sql.database import Database

sqlite_engine = Database._sqlite_engine
"""What runs outside of tests, which synchronises."""


def do_not_wait() -> None:
    """This process writes files and SQLite databases and synchronises none (PostgreSQL has a setting: servers)."""
    os.fsync = _no_wait
    Database._sqlite_engine = _unsynchronised  # type: ignore[method-assign]


def _no_wait(file: object) -> None:
    pass


def _unsynchronised(database: Database, begin: str) -> sa.Engine:
    engine = sqlite_engine(database, begin)
    sa.event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous=OFF").close())
    return engine
