"""``job delete`` and ``job_retention_days``: what goes from the database and the output's folder, and what stays."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.client.client import Client, JobHandle
from pipeline.config.settings import Settings
from pipeline.worker import maintenance
from storage import failpoints
from storage.errors import Conflict, NotFound, Unreachable
from storage.queue import deletion
from storage.sql import tables
from storage.states import FireState, JobState
from tests.embedded.test_schedules import House, house

__all__ = ["house"]


@pytest.fixture
def client(settings: Settings, database_url: str) -> Iterator[Client]:
    with Client(settings=settings.model_copy(update={"database_url": database_url})) as client:
        yield client


def submitted(client: Client, home: Path, out: str = "out", **more: object) -> JobHandle:
    if not (home / "in.parquet").exists():
        pq.write_table(pa.table({"text": ["a", None, "c"]}), home / "in.parquet")
    fields = {"input": str(home / "in.parquet"), "output": str(home / out), "model": "fake", "task": "generate"}
    return client.submit(prompt="{text}", start=False, **fields, **more)


def _age(client: Client) -> None:
    with client._runtime.database.write() as connection:
        connection.execute(tables.job.update().values(ended_at=tables.job.c.ended_at - 10 * 86_400))


def test_an_ended_job_is_deleted_and_what_it_published_stays(client: Client, tmp_path: Path) -> None:
    job = submitted(client, tmp_path, idempotency_key="k")
    with pytest.raises(Conflict, match="queued"):
        job.delete()
    assert job.wait(timeout=60).rows_failed == 1
    before = sorted(path.name for path in (tmp_path / "out").rglob("*") if ".rowmill" not in str(path))
    job.delete()
    assert client.jobs() == []
    for look in (job.status, job.delete, job.retry, lambda: client.job(job.id), lambda: job.wait(timeout=1)):
        with pytest.raises(NotFound):
            look()
    assert "_SUCCESS" in before
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if ".rowmill" not in str(p)) == before
    assert not (tmp_path / "out" / ".rowmill" / job.id).exists()
    # The output is taken, as that of any job; the key is not.
    with pytest.raises(Conflict, match="already holds published rows"):
        submitted(client, tmp_path)
    again = submitted(client, tmp_path, "again", idempotency_key="k")
    assert again.id != job.id
    assert again.wait(timeout=60).state is JobState.COMPLETED


def test_the_partial_output_of_a_cancelled_job_stays(client: Client, tmp_path: Path) -> None:
    job = submitted(client, tmp_path)
    job.cancel()
    job.delete()
    assert client.jobs() == []
    assert not (tmp_path / "out" / ".rowmill" / job.id).exists()


def test_retention_deletes_old_jobs_and_only_these(
    client: Client, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.jobs.deletion._AT_ONCE", 2)
    old = [submitted(client, tmp_path, f"old-{n}") for n in range(5)]
    for job in old:
        job.wait(timeout=60)
    live = submitted(client, tmp_path, "live")
    _age(client)
    young = submitted(client, tmp_path, "young")
    young.wait(timeout=60)
    maintenance.run_maintenance(client._runtime)
    assert len(client.jobs()) == 7  # by default everything stays
    keeping = client._runtime.settings.model_copy(update={"job_retention_days": 7.0})
    with Client(settings=keeping) as operator:
        maintenance.run_maintenance(operator._runtime, schedules=False)
        assert [job.id for job in operator.jobs()] == [young.id, live.id]
    assert all((tmp_path / f"old-{n}" / "_SUCCESS").exists() for n in range(5))


class _Died(BaseException):
    pass


def _die() -> None:
    raise _Died


def test_maintenance_finishes_what_somebody_began_to_delete(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submitted(client, tmp_path)
    job.wait(timeout=60)
    failpoints.arm("delete.marked", _die)
    try:
        with pytest.raises(_Died):
            job.delete()
    finally:
        failpoints.disarm()
    assert client.jobs() == []
    monkeypatch.setattr(deletion, "LEFT_ALONE_SECONDS", -1.0)
    assert maintenance.delete_jobs(client._runtime) == 1
    with client._runtime.database.read() as connection:
        assert connection.execute(tables.job.select()).all() == []


def test_a_job_whose_files_cannot_be_deleted_holds_up_no_other(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = submitted(client, tmp_path, "first"), submitted(client, tmp_path, "second")
    for job in (first, second):
        job.cancel()
    store, delete_tree = client._runtime.store, client._runtime.store.delete_tree

    def refuse(uri: str, *more: object) -> None:
        if "first" in uri:
            raise Unreachable("scripted by the test")
        delete_tree(uri, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "delete_tree", refuse)
    with pytest.raises(Unreachable):
        first.delete()
    monkeypatch.setattr(deletion, "LEFT_ALONE_SECONDS", -1.0)
    second.delete()
    assert maintenance.delete_jobs(client._runtime) == 0
    monkeypatch.undo()
    monkeypatch.setattr(deletion, "LEFT_ALONE_SECONDS", -1.0)
    assert maintenance.delete_jobs(client._runtime) == 1


def test_an_output_that_is_gone_does_not_keep_its_job(client: Client, tmp_path: Path) -> None:
    job = submitted(client, tmp_path)
    job.wait(timeout=60)
    shutil.rmtree(tmp_path / "out")
    job.delete()
    assert client.jobs() == []


def test_an_incremental_schedule_remembers_the_files_of_deleted_jobs(house: House) -> None:
    house.write("a.parquet", "a")
    house.add(incremental=True)
    first = house.come_due(1)
    assert house.run(first) == ["a"]
    house.client.job(str(first.job_id)).delete()
    assert house.come_due(2).state is FireState.EMPTY
    house.write("b.parquet", "b")
    third = house.come_due(3)
    assert third.job_id is not None
    # A job that did not complete has processed nothing, whether it is deleted or not.
    handle = house.client.job(third.job_id)
    handle.cancel()
    handle.delete()
    assert house.fire(1).job_id is None
    assert house.run(house.come_due(4)) == ["b"]
