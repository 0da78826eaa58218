"""Connections, transactions and the differences between SQLite and PostgreSQL, all in this one place."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from storage import urls
from storage.errors import (
    CommitUnknown,
    CorruptDatabase,
    InvalidJob,
    InvalidSettings,
    RowmillError,
    TransientError,
    WaitTimeout,
)
from storage.objects.local_files import make_room
from storage.sql import driver_errors, revisions, row_mapping

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from alembic.config import Config

    R = TypeVar("R", bound=DataclassInstance)

_CONNECT_SECONDS = 10
"""How long PostgreSQL may take to accept a connection, where the URL does not say (``connect_timeout``)."""
_IDLE_SECONDS = 30.0
"""How long PostgreSQL lets a process that has stopped answering keep a transaction, and the locks in it, open."""


class now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock, in Unix seconds: the only clock that leases, backoff and expiry know.

    PostgreSQL's ``now()`` stands still inside a transaction, so ``clock_timestamp()``; SQLite 3.40's
    ``unixepoch('now', 'subsec')`` is silently NULL, so the Julian day.
    """

    type = sa.Double()
    inherit_cache = True
    name = "now"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **kw: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


class today(FunctionElement[int]):  # noqa: N801 - reads as the SQL function it is
    """The UTC day by the database's clock, counted from 1970-01-01: what daily quotas go by."""

    type = sa.Integer()
    inherit_cache = True
    name = "today"


@compiles(today, "postgresql")
def _today_postgresql(element: today, compiler: Any, **kw: Any) -> str:
    return "CAST(floor(extract(epoch FROM clock_timestamp()) / 86400) AS integer)"


@compiles(today, "sqlite")
def _today_sqlite(element: today, compiler: Any, **kw: Any) -> str:
    return "CAST(julianday('now') - 2440587.5 AS INTEGER)"


class Database:
    """One database. ``write()`` and ``read()`` are the only ways in; both yield a connection inside a transaction.

    Raises :class:`InvalidSettings` for a URL that cannot be used, :class:`Unreachable` when the server does not answer,
    :class:`TransientError` when SQLite stays locked or PostgreSQL reports a serialisation failure or deadlock,
    :class:`CommitUnknown` when the connection breaks during COMMIT, :class:`CorruptDatabase` when a SQLite file does
    not hold what was written to it.
    """

    def __init__(self, url: str) -> None:
        self.url = _parse(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        if self.sqlite:
            make_room(Path(str(self.url.database)))
            self._writer = self._sqlite_engine("BEGIN IMMEDIATE")
            self._reader = self._sqlite_engine("BEGIN")
        else:
            self._writer = self._reader = sa.create_engine(
                self.url,
                pool_pre_ping=True,
                pool_size=5,
                max_overflow=20,
                json_serializer=_dump,
                connect_args={} if "connect_timeout" in self.url.query else {"connect_timeout": _CONNECT_SECONDS},
            )
            sa.event.listen(self._writer, "connect", _limit_idle)

    @property
    def place(self) -> str:
        """What to call this database to a person: the file, or the URL without its password."""
        return str(self.url.database) if self.sqlite else self.url.render_as_string()

    def _sqlite_engine(self, begin: str) -> sa.Engine:
        engine = sa.create_engine(self.url, connect_args={"timeout": driver_errors.BUSY_SECONDS}, json_serializer=_dump)

        @sa.event.listens_for(engine, "connect")
        def _connect(connection: Any, record: Any) -> None:
            connection.isolation_level = None  # the driver must not begin transactions of its own
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "temp_store=MEMORY"):
                connection.execute(f"PRAGMA {pragma}")

        @sa.event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that may write. On SQLite it holds the write lock from its first statement."""
        with self._translated(), self._writer.connect() as connection:
            transaction = connection.begin()
            try:
                yield connection
            except BaseException:
                if not connection.invalidated:
                    transaction.rollback()
                raise
            try:
                transaction.commit()
            except DBAPIError as error:
                raise CommitUnknown(f"the outcome of a COMMIT is not known: {driver_errors.reason(error)}") from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads; on SQLite it never waits for a writer."""
        with self._translated(), self._reader.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except RowmillError:
            raise
        except (DBAPIError, sqlite3.Error) as error:
            if (ours := driver_errors.explained(error, self.place, sqlite=self.sqlite)) is not None:
                raise ours from error
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            # What was read makes no sense. Either the file is damaged, or this is a mistake of ours.
            if self.sqlite and (damage := driver_errors.damage(self.place)) is not None:
                raise CorruptDatabase(self.place, damage) from error
            raise

    def rows(self, query: sa.Executable) -> list[Any]:
        """All rows of a query, read in a transaction of its own."""
        with self.read() as connection:
            return list(connection.execute(query))

    def row(self, query: sa.Executable) -> sa.Row[Any] | None:
        """The first row of a query, if any."""
        with self.read() as connection:
            return connection.execute(query).first()

    def scalars(self, query: sa.Executable) -> list[Any]:
        """The first column of a query."""
        return [row[0] for row in self.rows(query)]

    def scalar(self, query: sa.Executable) -> Any:
        """The first column of the first row; ``None`` without a row."""
        row = self.row(query)
        return None if row is None else row[0]

    def records(self, kind: type[R], query: sa.Executable) -> list[R]:
        """All rows of a query, as records of this kind."""
        return [row_mapping.read(kind, row) for row in self.rows(query)]

    def record(self, kind: type[R], query: sa.Executable) -> R | None:
        """The first row of a query, if any, as a record of this kind."""
        row = self.row(query)
        return None if row is None else row_mapping.read(kind, row)

    def pages(self, query: sa.Select[Any], key: sa.Column[Any], size: int) -> Iterator[list[Any]]:
        """The rows of a query by rising ``key`` (unique among them), at most ``size`` in memory at a time."""
        rest = query
        while page := self.rows(rest.order_by(key).limit(size)):
            yield page
            if len(page) < size:
                return
            rest = query.where(key > getattr(page[-1], key.key))

    def change(self, statement: sa.Executable) -> int:
        """Run one statement in a transaction of its own; returns how many rows it has changed."""
        with self.write() as connection:
            result: Any = connection.execute(statement)
            return int(result.rowcount)

    def locked(self, query: sa.Select[Any], *, skip: bool = False) -> sa.Select[Any]:
        """The query with its rows locked until the transaction ends. SQLite's write lock already covers them.

        The lock leaves foreign keys to these rows alone (``FOR NO KEY UPDATE``). Otherwise a flush, whose event refers
        to the job, would wait for whoever has locked the job while it holds its shard: measured to deadlock.
        """
        return query if self.sqlite else query.with_for_update(skip_locked=skip, key_share=True)

    def clock(self) -> float:
        """The database's time, in Unix seconds."""
        return float(self.scalar(sa.select(now())))

    def revision(self) -> str | None:
        """The schema revision that the database is at; ``None`` when it has no tables yet."""
        with self.read() as connection:
            if not sa.inspect(connection).has_table(revisions.TABLE):
                return None
            return connection.execute(sa.text(f"SELECT version_num FROM {revisions.TABLE}")).scalar()  # noqa: S608

    def ensure_schema(self) -> None:
        """Bring an embedded database up to date; on a server only check, since upgrades are the operator's step."""
        if (missing := self.schema_gap()) is None:
            return
        if not self.sqlite:
            raise RowmillError(missing)
        with self._writing_schema() as connection:
            if not sa.inspect(connection).has_table(revisions.TABLE):
                revisions.create(connection)
                return
        self.upgrade()

    def schema_gap(self) -> str | None:
        """What this version needs of the database's schema and does not find there; ``None`` when all of it is there.

        Raises :class:`RowmillError` when the schema is a newer version's: no migration of this one helps.
        """
        head = revisions.newest()
        current = self.revision()
        if current == head:
            return None
        where = self.place
        if current is not None and current not in revisions.known():
            raise RowmillError(
                f"the database at {where} is at revision {current}, which this version does not "
                f"know (its newest is {head}): upgrade Rowmill, or use another data_dir or database_url"
            )
        at = f"at revision {current}" if current else "empty"
        return f"the database at {where} is {at}, this version needs {head}: run 'rowmill db upgrade'"

    def upgrade(self, target: str = "head") -> None:
        """Run the migrations up to ``target``; processes that do so at the same time take turns."""
        from alembic import command  # a third of a second, and most processes find an up-to-date database

        with self._writing_schema() as connection:
            command.upgrade(_alembic(connection), target)

    @contextmanager
    def _writing_schema(self) -> Iterator[sa.Connection]:
        with self.write() as connection:
            if not self.sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x726F776D)))
            try:
                yield connection
            except DBAPIError as error:
                if "already exists" not in driver_errors.reason(error):
                    raise
                raise RowmillError(
                    f"the database at {self.place} is another program's, or a part of Rowmill's: "
                    f"{driver_errors.reason(error)}; use another data_dir or database_url"
                ) from error

    def downgrade(self, target: str) -> None:
        """Run the migrations back to ``target``."""
        from alembic import command

        with self.write() as connection:
            command.downgrade(_alembic(connection), target)

    def close(self) -> None:
        """Close all connections."""
        self._writer.dispose()
        self._reader.dispose()


def _limit_idle(connection: Any, record: Any) -> None:
    # A worker frozen inside a transaction would otherwise hold its job's row, and so block everybody, for ever.
    connection.execute(f"SET idle_in_transaction_session_timeout = {int(_IDLE_SECONDS * 1000)}")
    connection.commit()


def upgrade(url: str) -> str:
    """Bring the database at ``url`` to the newest schema; returns the revision it is at now."""
    with closing(Database(url)) as database:
        database.upgrade()
        return str(database.revision())


def downgrade(url: str, revision: str) -> str:
    """Take the database at ``url`` back to an earlier ``revision``; returns the revision it is at now.

    Raises :class:`InvalidJob` when this version has no such revision, or the database is not beyond it.
    """
    with closing(Database(url)) as database:
        at = database.revision()
        earlier = revisions.before(at)
        if revision not in earlier:
            known = f"it is at {at}; earlier ones are {', '.join(earlier)}" if earlier else f"it is at {at}, the first"
            raise InvalidJob(f"the database cannot go back to {revision!r}: {known}", field="REVISION")
        database.downgrade(revision)
        return str(database.revision())


def await_schema(url: str, *, timeout: float | None, notice: Callable[[str], None], poll_seconds: float = 2.0) -> None:
    """Wait until the database at ``url`` answers and has this version's schema.

    ``notice`` is told what is waited for, once for each reason. Raises :class:`WaitTimeout` after ``timeout`` seconds,
    and :class:`RowmillError` at once when the schema is a newer version's.
    """
    end = None if timeout is None else time.monotonic() + timeout
    said = None
    with closing(Database(url)) as database:
        while True:
            try:
                missing = database.schema_gap()
            except TransientError as error:
                missing = str(error)
            if missing is None:
                return
            if end is not None and time.monotonic() >= end:
                raise WaitTimeout(f"gave up after {timeout:g} seconds: {missing}")
            if missing != said:
                notice(f"waiting: {missing}")
                said = missing
            time.sleep(poll_seconds if end is None else max(0.0, min(poll_seconds, end - time.monotonic())))


def _alembic(connection: sa.Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(revisions.MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def _parse(url: str) -> sa.URL:
    try:
        return urls.database_url(url)
    except ValueError as error:
        raise InvalidSettings(str(error), field="database_url") from None


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
