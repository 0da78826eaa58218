"""The suite's own servers: they answer, they restart on the same port and data, and none outlives a killed session."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
import s3fs
import sqlalchemy as sa

from tests.conftest import S3
from tests.servers import Server


@pytest.mark.postgres
def test_each_test_gets_a_postgres_database_of_its_own_with_the_schema(postgres_database: str) -> None:
    engine = sa.create_engine(postgres_database)
    with engine.connect() as connection:
        assert "shard" in sa.inspect(connection).get_table_names()
        assert connection.execute(sa.text("SHOW server_version_num")).scalar_one() >= "180000"
    engine.dispose()


@pytest.mark.postgres
def test_postgres_keeps_what_was_committed_when_it_is_killed(postgres_database: str, postgres_server: Server) -> None:
    dsn = postgres_database.replace("+psycopg", "")
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE kept (x int)")
        connection.execute("INSERT INTO kept VALUES (7)")
    postgres_server.kill()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)
    postgres_server.start()
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT x FROM kept").fetchall() == [(7,)]


def test_redis_is_empty_for_each_test(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", "behind")


test_redis_is_empty_for_the_next_test = test_redis_is_empty_for_each_test


def test_s3_keeps_objects(s3: S3) -> None:
    files = s3fs.S3FileSystem(**s3.storage_options["s3"])
    files.pipe_file(s3.url("a/b"), b"hello")
    assert files.cat_file(s3.url("a/b")) == b"hello"
    assert files.ls(s3.url(), detail=False) == [f"{s3.bucket}/a"]


@pytest.mark.parametrize("server", ["postgres", "redis_server", "s3_server"])
def test_a_killed_session_leaves_no_server_behind(server: str) -> None:
    with tempfile.TemporaryDirectory(prefix="rowmill-killed-") as home:
        script = f"""
            import signal
            from pathlib import Path
            from tests import servers
            server, _ = servers.{server}(Path({home!r}))
            server.start()
            print(server.pid, flush=True)
            signal.pause()
        """
        session = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert session.stdout is not None
        child = psutil.Process(int(session.stdout.readline()))
        session.send_signal(signal.SIGKILL)
        session.wait()
        child.wait(timeout=30)
        assert not child.is_running()
