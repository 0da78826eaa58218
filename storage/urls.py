"""URLs of databases and brokers: parsed and checked in this one place, before anything is connected to or stored.

Every function raises ``ValueError`` with what is wrong and what to write instead, and never repeats the URL, which may
hold a password.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlalchemy as sa

_DATABASES = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
_BROKERS = "redis://:PASSWORD@HOST:6379/0 or amqp://USER:PASSWORD@HOST:5672//"
_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_REDIS, _AMQP = frozenset({"redis", "rediss"}), frozenset({"amqp", "amqps", "pyamqp"})
_SOCKET = "redis+socket"
_SOCKET_URL = "redis+socket:///path/of/the/socket"
_NOT_IN_A_URL = re.compile(r"[\x00-\x20\x7f\ud800-\udfff]")
_CERTIFICATES = ("CERT_REQUIRED", "CERT_OPTIONAL", "CERT_NONE", "required", "optional", "none")
_LAST_PORT = 65_535


def database_url(url: str) -> sa.URL:
    """The parsed URL of a database that Rowmill can use, with its driver installed."""
    import sqlalchemy as sa
    from sqlalchemy.exc import ArgumentError

    if "\0" in url or "%00" in url:
        raise ValueError("a database URL cannot hold a NUL character")
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise ValueError(f"not a database URL; write {_DATABASES}") from None
    except ValueError:
        raise ValueError(f"the port in the database URL is no number; write {_DATABASES}") from None
    name = parsed.drivername
    if name not in _DRIVERS:
        raise ValueError(f"{name}:// is not a database that Rowmill can use; write {_DATABASES}")
    return _sqlite(parsed) if _DRIVERS[name] == "sqlite" else _postgresql(parsed.set(drivername=_DRIVERS[name]))


def _sqlite(url: sa.URL) -> sa.URL:
    if url.host or url.username or url.password or url.port:
        raise ValueError("a SQLite URL names a file and no host: three slashes before a relative path, four before '/'")
    if url.query:
        raise ValueError("a SQLite URL takes no parameters; write '?' in the name of a file as %3F")
    if url.database in (None, "", ":memory:") or str(url.database).startswith("file:"):
        raise ValueError("an in-memory SQLite database cannot survive a crash; give a file: sqlite:///FILE")
    return url


def _postgresql(url: sa.URL) -> sa.URL:
    from sqlalchemy.exc import ArgumentError

    if url.port is not None and not 0 < url.port <= _LAST_PORT:
        raise ValueError(f"the port in the database URL is not between 1 and {_LAST_PORT}")
    if url.host and "@" in url.host:
        raise ValueError("the database URL holds '@' more than once; write '@' in a user's name or password as %40")
    hosts = ",".join([url.host or "", *_texts(url.query.get("host"))])
    try:
        for host in hosts.split(","):
            if not host.startswith("/"):  # a folder of sockets
                host.encode("idna")
    except UnicodeError:
        raise ValueError("the host in the database URL is no name of a host") from None
    try:
        dialect = url.get_dialect()
        dialect.import_dbapi()
        from psycopg import ProgrammingError
        from psycopg.conninfo import make_conninfo
    except ImportError:
        raise ValueError("the driver 'psycopg' is not installed: pip install 'rowmill[postgres]'") from None
    try:
        positional, options = dialect().create_connect_args(url)
        make_conninfo(*positional, **options)
    except (ArgumentError, ProgrammingError, ValueError, TypeError):
        names = ", ".join(sorted(url.query))
        raise ValueError(f"the parameters after '?' ({names}) are not all known to PostgreSQL's client") from None
    return url


def _texts(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """A parameter of a URL that may occur more than once."""
    return (value,) if isinstance(value, str) else value or ()


def broker_url(url: str) -> str:
    """The URL of a broker that Rowmill can use, as it was given; several are separated by ``;``."""
    for one in url.split(";"):
        _broker(one)
    return url


def _broker(url: str) -> None:
    from kombu.utils.url import url_to_parts

    if _NOT_IN_A_URL.search(url):
        raise ValueError("a broker URL holds no white space or control characters; write them as %20 and the like")
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ValueError(f"not a broker URL; write {_BROKERS}")
    if scheme == "sentinel":
        raise ValueError("sentinel:// needs the name of a master, for which there is no setting; write redis://…")
    if scheme == _SOCKET:
        if not rest.partition("@")[2].startswith("/") and not rest.startswith("/"):
            raise ValueError(f"a socket is given by its path; write {_SOCKET_URL}")
        _check_names(_query(rest), ("virtual_host",))
        return
    if scheme not in _REDIS | _AMQP:
        raise ValueError(f"{scheme[:40]!r} is not a broker that Rowmill can use; write {_BROKERS}")
    try:
        parts: Any = url_to_parts(url)
        host = parts.hostname or ""
        host.encode("idna")
    except UnicodeError:
        raise ValueError("the host in the broker URL is no name of a host") from None
    except ValueError:
        raise ValueError(f"the host or port in the broker URL cannot be read; write {_BROKERS}") from None
    if "\0" in host or "\0" in (parts.path or ""):
        raise ValueError("a broker URL cannot hold a NUL character")
    if scheme in _REDIS and not (parts.path or "0").strip("/").isdecimal():
        raise ValueError("the path of a Redis URL is the number of a database: redis://HOST:6379/0")
    _check_names(parts.query, ("ssl_",))
    if parts.query.get("ssl_cert_reqs", _CERTIFICATES[0]) not in _CERTIFICATES:
        raise ValueError(f"ssl_cert_reqs in the broker URL is none of {', '.join(_CERTIFICATES)}")


def _query(rest: str) -> dict[str, str]:
    from urllib.parse import parse_qsl

    return dict(parse_qsl(rest.partition("?")[2], keep_blank_values=True))


def _check_names(query: Any, prefixes: tuple[str, ...]) -> None:
    unknown = sorted(name for name in query if not name.startswith(prefixes))
    if unknown:
        raise ValueError(
            f"a broker URL takes no parameter {', '.join(unknown)}; a password stands before the host: {_BROKERS}"
        )
