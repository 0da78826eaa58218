"""Fixtures of the whole suite: servers, each started by the first test that asks for it, and temporary settings."""

from __future__ import annotations

import os
import signal

# Under nohup, or in a shell's background, these are ignored, and would be by every process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports transformers, onnxruntime or vLLM: nothing calls out, and a CPU engine's cache takes 1 GiB.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# The settings of whoever runs the tests must not reach them.
for _name in [name for name in os.environ if name.startswith("ROWMILL_")]:
    del os.environ[_name]

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

pytest.register_assert_rewrite("pipeline.engines.testing", "pipeline.engines.testing_calls")

from pipeline import Client
from pipeline.config.settings import Settings
from storage.sql import database
from tests import disks, examples, servers

examples.load_profile()
disks.do_not_wait()

SERVERS = {"postgres_server", "redis_server", "s3_server"}


# What takes longest comes first, so that two processes end together; by turns what computes and what waits.
LONGEST = [
    "engines/vllm/test_engine.py",
    "faults/storage/test_model.py",
    "acceptance/test_main_job.py",
    "faults/control/test_finalizer.py",
    "engines/vllm/test_pooling.py",
    "faults/storage/test_objects.py",
    "engines/vllm/test_reuse.py",
    "faults/control/test_liveness.py",
    "engines/vllm/test_tasks.py",
    "faults/storage/test_commit.py",
    "engines/vllm/prompts/test_media.py",
    "integration/test_fleet.py",
    "engines/vllm/process/test_recycling.py",
    "faults/workers/test_workers.py",
    "packaged/test_smollm2.py",
    "faults/control/test_broker.py",
    "embedded/test_result_cache.py",
    "integration/test_worker.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the mark ``server`` for what asks for a server or is of PostgreSQL (`make unit`)."""
    place = {Path(__file__).parent / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    for item in items:
        if SERVERS.intersection(getattr(item, "fixturenames", ())) or item.get_closest_marker("postgres"):
            item.add_marker("server")


@dataclass(frozen=True, slots=True)
class S3:
    """An S3 endpoint and an empty bucket of its own for this test."""

    endpoint: str
    bucket: str
    access_key: str = "testing"
    secret_key: str = "testing"

    @property
    def storage_options(self) -> dict[str, dict[str, Any]]:
        """For ``Settings(storage_options=…)``."""
        return {
            "s3": {
                "key": self.access_key,
                "secret": self.secret_key,
                "endpoint_url": self.endpoint,
            }
        }

    def url(self, path: str = "") -> str:
        return f"s3://{self.bucket}/{path}"


@pytest.fixture(scope="session", autouse=True)
def _an_empty_configuration_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nor must the configuration file of whoever runs the tests reach them."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@contextmanager
def _home(name: str) -> Iterator[Path]:
    # Not below pytest's own folder, which no other user may enter (PostgreSQL runs as one when the tests run as root).
    path = Path(tempfile.mkdtemp(prefix=f"rowmill-{name}-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[servers.Server]:
    """The PostgreSQL process, for tests that stop it and start it again."""
    with _home("postgres") as home:
        server, _ = servers.postgres(home)
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def postgres_url(postgres_server: servers.Server) -> str:
    """SQLAlchemy URL of the server's ``postgres`` database, for administration: tests use ``postgres_database``."""
    return f"postgresql+psycopg://postgres@127.0.0.1:{postgres_server.port}/postgres"


@pytest.fixture(scope="session")
def _postgres_admin(postgres_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def _postgres_template(_postgres_admin: sa.Engine, postgres_url: str) -> str:
    """A database with the newest schema, copied for every test: ten times faster than migrating each."""
    with _postgres_admin.connect() as admin:
        admin.execute(sa.text("CREATE DATABASE migrated"))
    database.upgrade(_with_database(postgres_url, "migrated"))
    return "migrated"


@pytest.fixture
def postgres_empty(_postgres_admin: sa.Engine, postgres_url: str) -> Iterator[str]:
    """SQLAlchemy URL of a fresh database without any table."""
    yield from _fresh_database(_postgres_admin, postgres_url, "template1")


@pytest.fixture
def postgres_database(_postgres_admin: sa.Engine, postgres_url: str, _postgres_template: str) -> Iterator[str]:
    """SQLAlchemy URL of a fresh database at the newest schema."""
    yield from _fresh_database(_postgres_admin, postgres_url, _postgres_template)


def _fresh_database(admin: sa.Engine, url: str, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    yield _with_database(url, name)
    with admin.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


def _with_database(url: str, name: str) -> str:
    return sa.make_url(url).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the newest schema, copied for every test: migrating each takes a hundred times as long."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    database.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLAlchemy URL of a fresh database at the newest schema: the test runs once on SQLite and once on PostgreSQL."""
    if request.param == "postgres":
        url: str = request.getfixturevalue("postgres_database")
        return url
    template: Path = request.getfixturevalue("sqlite_template")
    return f"sqlite:///{shutil.copy(template, tmp_path / 'rowmill.db')}"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.Server]:
    """The Redis process, for tests that stop it and start it again."""
    with _home("redis") as home:
        server, _ = servers.redis_server(home)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def redis_url(redis_server: servers.Server) -> Iterator[str]:
    """URL of an empty Redis database."""
    import redis

    url = f"redis://127.0.0.1:{redis_server.port}/0"
    with redis.Redis.from_url(url) as client:
        client.flushall()
    yield url


@pytest.fixture(scope="session")
def s3_server() -> Iterator[servers.Server]:
    """The process behind ``s3``, for tests that stop it and start it again (its objects are then gone)."""
    with _home("s3") as home:
        server, _ = servers.s3_server(home)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def s3(s3_server: servers.Server) -> S3:
    """An S3 endpoint with an empty bucket."""
    import s3fs

    bucket = S3(endpoint=f"http://127.0.0.1:{s3_server.port}", bucket=f"test-{uuid.uuid4().hex}")
    s3fs.S3FileSystem(**bucket.storage_options["s3"]).mkdir(bucket.bucket)
    return bucket


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the session, so that a graph is exported once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(tmp_path: Path, cache_dir: Path, sqlite_template: Path) -> Settings:
    """Settings of an embedded process: a data folder with a database at the newest schema, and the session's cache."""
    (tmp_path / "data").mkdir(exist_ok=True)
    shutil.copy(sqlite_template, tmp_path / "data/rowmill.db")
    return Settings(data_dir=tmp_path / "data", cache_dir=cache_dir)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings) as client:
        yield client
