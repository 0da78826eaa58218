"""A job that nobody works on is said to be interrupted, or not started, in whatever state its process left it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from pipeline import Client, JobHandle
from pipeline.config.settings import Settings
from pipeline.process.attendance import attending
from pipeline.spec.status import Phase
from storage.errors import WaitTimeout
from storage.fleet import attendance, workers
from storage.fleet.workers import Worker
from storage.queue import claims, jobs, plan_leases, publish_leases
from storage.sql import tables
from storage.sql.database import Database, now
from storage.states import JobState


@pytest.fixture
def client(settings: Settings, database_url: str) -> Iterator[Client]:
    with Client(settings=settings.model_copy(update={"database_url": database_url})) as client:
        yield client


@pytest.fixture
def job(client: Client, tmp_path: Path) -> JobHandle:
    """Queued, with two shards; nobody runs it."""
    return submitted(client, tmp_path)


def submitted(client: Client, folder: Path) -> JobHandle:
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(20)]}), folder / "texts.parquet")
    return client.submit(
        start=False,
        input=str(folder / "texts.parquet"),
        output=str(folder / "out"),
        model="fake",
        task="generate",
        prompt="{text}",
        shard_rows=10,
    )


def dead(client: Client) -> Worker:
    """A process of this host that was killed after it had registered."""
    mine = client._runtime.worker
    pid = next(pid for pid in range(2, 1 << 22) if not psutil.pid_exists(pid))
    worker = replace(mine, id=f"{mine.host}:{pid}:dead", pid=pid)
    workers.register(client._runtime.database, worker)
    return worker


def killed_in(client: Client, job: JobHandle, state: JobState) -> None:
    """Leave the job as a process does that is killed when the job is in ``state``."""
    database, worker = client._runtime.database, dead(client)
    attendance.attend(database, worker.id, job.id)
    if state is JobState.VALIDATING:
        with database.write() as connection:
            connection.execute(tables.job.update().where(tables.job.c.id == job.id).values(state=state))
        return
    if state is JobState.QUEUED:
        return
    claim = claims.claim(database, owner=worker.id, lease_seconds=3600, job_id=job.id)
    assert claim is not None
    if state is JobState.CANCELLING:
        jobs.request_stop(database, job.id, "cancelled", actor=worker.id)
    if state is JobState.FINALIZING:
        with database.write() as connection:
            connection.execute(tables.job.update().where(tables.job.c.id == job.id).values(state=state))
            connection.execute(tables.shard.update().where(tables.shard.c.job_id == job.id).values(state="cancelled"))
        assert publish_leases.claim_finalize(database, owner=worker.id, lease_seconds=3600, job_id=job.id) is not None


LIVE = [
    JobState.VALIDATING,
    JobState.QUEUED,
    JobState.IN_PROGRESS,
    JobState.FINALIZING,
    JobState.CANCELLING,
]


@pytest.mark.parametrize("state", LIVE)
def test_a_killed_process_leaves_an_interrupted_job(client: Client, job: JobHandle, state: JobState) -> None:
    killed_in(client, job, state)
    status = job.status()
    assert (status.state, status.attended, status.interrupted) == (state, False, True)
    assert status.message == f"interrupted; nobody is running it; resume with 'rowmill job resume {job.id}'"
    [listed] = client.jobs()
    assert replace(listed, phase_seconds=status.phase_seconds) == status  # time passes between the two
    assert status.to_json()["interrupted"] is True


def test_a_job_that_was_only_submitted_is_not_started(job: JobHandle) -> None:
    status = job.status()
    assert (status.attended, status.interrupted) == (False, False)
    assert status.message is not None
    assert status.message.startswith("not started; nobody is running it; resume with")


def test_a_job_in_good_hands_is_not(client: Client, job: JobHandle) -> None:
    """Between two shards, or while all of them are in backoff, its process holds none."""
    runtime = client._runtime
    runtime.register()
    with attending(runtime, job.id):
        assert job.status().attended
    assert not job.status().attended


def silence(database: Database, worker: Worker, seconds: float) -> None:
    with database.write() as connection:
        silent = sa.update(tables.worker).where(tables.worker.c.id == worker.id)
        connection.execute(silent.values(heartbeat_at=now() - seconds))


def test_another_hosts_process_is_known_by_its_heartbeats(client: Client, job: JobHandle) -> None:
    database = client._runtime.database
    worker = replace(dead(client), id="elsewhere:1:aaaa", host="elsewhere")
    workers.register(database, worker)
    attendance.attend(database, worker.id, job.id)
    assert job.status().attended
    silence(database, worker, worker.lease_seconds + 1)
    assert job.status().interrupted


def test_an_interrupted_job_is_resumed_by_waiting(client: Client, job: JobHandle) -> None:
    killed_in(client, job, JobState.IN_PROGRESS)
    status = job.wait(timeout=60)
    assert (status.state, status.attended, status.interrupted) == (JobState.COMPLETED, True, False)
    assert status.message is None


def test_in_a_fleet_a_worker_of_the_queue_is_missed(settings: Settings, postgres_database: str, tmp_path: Path) -> None:
    fleet = {"database_url": postgres_database, "broker_url": "redis://127.0.0.1:1/0"}
    with Client(settings=settings.model_copy(update=fleet)) as client:
        job = submitted(client, tmp_path)
        database = client._runtime.database
        status = job.status()
        assert (status.state, status.attended, status.interrupted) == (JobState.VALIDATING, False, False)
        assert "no worker is alive for the queue 'control'" in str(status.message)
        with pytest.raises(WaitTimeout, match="no worker is alive"):
            job.wait(timeout=0)
        control = Worker("elsewhere:1:aaaa", "elsewhere", 1, 1.5, queues=("control",), lease_seconds=30.0)
        workers.register(database, control)
        assert job.status().attended
        assert job.status().phase is Phase.UNPLANNED
        owner = plan_leases.owner_of(control.id)
        assert plan_leases.claim(database, owner=owner, lease_seconds=3600) is not None
        assert job.status().phase is Phase.READING
        plan_leases.release(database, owner)
        assert job.status().phase is Phase.UNPLANNED
        silence(database, control, 31)
        assert not job.status().attended
