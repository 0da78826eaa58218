"""Connections, transactions and the differences between SQLite and PostgreSQL, all in this one place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from pyroaring import BitMap
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from storage.errors import CommitUnknown, InvalidJob, RowmillError, TransientError, Unreachable, WaitTimeout

_MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"
_BUSY_SECONDS = 60
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


def pack(rows: BitMap) -> bytes:
    """A bitmap as bytes for a column."""
    rows.run_optimize()
    return rows.serialize()


def unpack(data: bytes | None) -> BitMap:
    """A column's bytes as a bitmap; NULL is empty."""
    return BitMap.deserialize(data) if data is not None else BitMap()


class Database:
    """One database. ``write()`` and ``read()`` are the only ways in; both yield a connection inside a transaction.

    Raises :class:`Unreachable` when the server does not answer, :class:`TransientError` when SQLite stays locked or
    PostgreSQL reports a serialisation failure or deadlock, :class:`CommitUnknown` when the connection breaks during
    COMMIT.
    """

    def __init__(self, url: str) -> None:
        self.url = _parse(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        if self.sqlite:
            if self.url.database in (None, "", ":memory:"):
                raise InvalidJob(
                    "an in-memory SQLite database cannot survive a crash; give a file", field="database_url"
                )
            Path(str(self.url.database)).parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._sqlite_engine("BEGIN IMMEDIATE")
            self._reader = self._sqlite_engine("BEGIN")
        else:
            self._writer = self._reader = sa.create_engine(
                self.url, pool_pre_ping=True, pool_size=5, max_overflow=20, json_serializer=_dump
            )
            sa.event.listen(self._writer, "connect", _limit_idle)

    def _sqlite_engine(self, begin: str) -> sa.Engine:
        engine = sa.create_engine(self.url, connect_args={"timeout": _BUSY_SECONDS}, json_serializer=_dump)

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
        with _translated(), self._writer.connect() as connection:
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
                raise CommitUnknown(f"the outcome of a COMMIT is not known: {_reason(error)}") from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads; on SQLite it never waits for a writer."""
        with _translated(), self._reader.connect() as connection, connection.begin():
            yield connection

    def locked(self, query: sa.Select[Any], *, skip: bool = False) -> sa.Select[Any]:
        """The query with its rows locked until the transaction ends. SQLite's write lock already covers them.

        The lock leaves foreign keys to these rows alone (``FOR NO KEY UPDATE``). Otherwise a flush, whose event refers
        to the job, would wait for whoever has locked the job while it holds its shard: measured to deadlock.
        """
        return query if self.sqlite else query.with_for_update(skip_locked=skip, key_share=True)

    def clock(self) -> float:
        """The database's time, in Unix seconds."""
        with self.read() as connection:
            return float(connection.execute(sa.select(now())).scalar_one())

    def revision(self) -> str | None:
        """The schema revision that the database is at; ``None`` when it has no tables yet."""
        with self.read() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def ensure_schema(self) -> None:
        """Bring an embedded database up to date; on a server only check, since upgrades are the operator's step."""
        if (missing := self.schema_gap()) is None:
            return
        if not self.sqlite:
            raise RowmillError(missing)
        self.upgrade()

    def schema_gap(self) -> str | None:
        """What this version needs of the database's schema and does not find there; ``None`` when all of it is there.

        Raises :class:`RowmillError` when the schema is a newer version's: no migration of this one helps.
        """
        scripts = ScriptDirectory(str(_MIGRATIONS))
        head = scripts.get_current_head()
        current = self.revision()
        if current == head:
            return None
        where = self.url.render_as_string()
        if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
            raise RowmillError(
                f"the database at {where} is at revision {current}, which this version does not "
                f"know (its newest is {head}): upgrade Rowmill, or use another data_dir or database_url"
            )
        at = f"at revision {current}" if current else "empty"
        return f"the database at {where} is {at}, this version needs {head}: run 'rowmill db upgrade'"

    def upgrade(self, target: str = "head") -> None:
        """Run the migrations up to ``target``; processes that do so at the same time take turns."""
        with self.write() as connection:
            if not self.sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x726F776D)))
            command.upgrade(_alembic(connection), target)

    def downgrade(self, target: str) -> None:
        """Run the migrations back to ``target``."""
        with self.write() as connection:
            command.downgrade(_alembic(connection), target)

    def close(self) -> None:
        """Close all connections."""
        self._writer.dispose()
        self._reader.dispose()


def _limit_idle(connection: Any, record: Any) -> None:
    # A worker that is frozen inside a transaction would else hold its job's row, and with it everybody, for ever.
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
        earlier = revisions_before(at)
        if revision not in earlier:
            known = f"it is at {at}; earlier ones are {', '.join(earlier)}" if earlier else f"it is at {at}, the first"
            raise InvalidJob(f"the database cannot go back to {revision!r}: {known}", field="REVISION")
        database.downgrade(revision)
        return str(database.revision())


def revisions_before(revision: str | None) -> list[str]:
    """The revisions that this version knows before ``revision``, the newest of them first."""
    known = [script.revision for script in ScriptDirectory(str(_MIGRATIONS)).walk_revisions()]
    return known[known.index(revision) + 1 :] if revision in known else []


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
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError) as error:
        raise InvalidJob(f"not a database URL: {_first_line(error)}", field="database_url") from None
    except ModuleNotFoundError as error:
        raise InvalidJob(
            f"the driver {error.name!r} is not installed: pip install 'rowmill[postgres]'", field="database_url"
        ) from None
    if parsed.get_backend_name() == "postgresql" and parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise InvalidJob(
            f"{parsed.get_backend_name()} is not supported; use sqlite:/// or postgresql://", field="database_url"
        )
    return parsed


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


_RETRYABLE_SQLSTATES: Sequence[str] = ("40001", "40P01", "55P03")
_PG_GONE = ("08", "53", "57")
"""Classes of SQLSTATE: connection failure, out of resources, shut down by an operator."""
_SQLITE_GONE = ("SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_FULL", "SQLITE_READONLY", "SQLITE_PROTOCOL")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        sqlstate = getattr(error.orig, "sqlstate", None)
        sqlite_code = getattr(error.orig, "sqlite_errorname", None) or ""
        if sqlstate in _RETRYABLE_SQLSTATES or sqlite_code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise TransientError(f"the database is busy: {_reason(error)}") from error
        gone = sqlite_code.startswith(_SQLITE_GONE) if sqlite_code else sqlstate is None or sqlstate[:2] in _PG_GONE
        lost = error.connection_invalidated or (isinstance(error, sa.exc.OperationalError) and gone)
        if lost:
            raise Unreachable(f"the database does not answer: {_reason(error)}") from error
        raise


def _reason(error: DBAPIError) -> str:
    return _first_line(error.orig or error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
