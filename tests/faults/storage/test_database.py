"""Faults 12 and 13: the database server goes away in the middle of things, and comes back.

Only on PostgreSQL: SQLite has no server. What a killed process leaves of an SQLite transaction is fault 1.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from pipeline.worker.maintenance import reap
from storage.errors import CommitUnknown
from storage.queue import claims
from storage.queue.reaper import Reaped
from storage.records import Claim
from storage.sql import database, tables
from storage.sql.database import Database, now
from storage.states import AttemptState, JobState, ShardState
from tests import servers
from tests.faults.conftest import make_settings
from tests.faults.driver import World, wait_stopped, wait_until
from tests.faults.wire import Cut, wire

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def server() -> Iterator[servers.Server]:
    """A PostgreSQL of this module's own: it is stopped and started under everybody who uses it."""
    home = Path(tempfile.mkdtemp(prefix="rowmill-faults-"))
    made, _ = servers.postgres(home)
    made.start()
    yield made
    made.stop()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def world(server: servers.Server, tmp_path: Path, cache_dir: Path) -> Iterator[World]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"host=127.0.0.1 port={server.port} user=postgres", autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    url = f"postgresql+psycopg://postgres@127.0.0.1:{server.port}/{name}"
    database.upgrade(url)
    made = World(make_settings(tmp_path, cache_dir, url), tmp_path)
    yield made
    made.close()


def _halves(world: World) -> list[sa.Row[tuple[str, str, int, str | None, int]]]:
    """Shards that are neither claimed nor ready, in one snapshot: state, fence, lease and open attempt disagree."""
    shard, attempt = tables.shard, tables.attempt
    newest = sa.select(sa.func.coalesce(sa.func.max(attempt.c.attempt_no), 0)).where(attempt.c.shard_id == shard.c.id)
    running = (
        sa.select(sa.func.count())
        .where(attempt.c.shard_id == shard.c.id, attempt.c.state == AttemptState.RUNNING)
        .scalar_subquery()
    )
    held = shard.c.state == ShardState.RUNNING
    query = sa.select(shard.c.id, shard.c.state, shard.c.attempt_no, shard.c.lease_owner, running).where(
        sa.or_(
            shard.c.attempt_no != newest.scalar_subquery(),
            running != sa.case((held, 1), else_=0),
            shard.c.lease_owner.is_not(None) != held,
            shard.c.lease_until.is_not(None) != held,
        )
    )
    with world.database.read() as connection:
        return list(connection.execute(query))


def _claim(database: Database, job: str) -> Claim | None:
    return claims.claim(database, owner="a-worker-that-is-gone", lease_seconds=1.0, job_id=job)


def test_12_restarted_before_the_claim_is_committed(world: World, server: servers.Server) -> None:
    """Fault 12: the server restarts just before a claim's COMMIT reaches it. The shard is as ready as before."""
    job = world.submit()
    other = Database(str(world.settings.database_url))

    def restart(connection: sa.Connection) -> None:
        server.stop()
        server.start()

    sa.event.listen(other._writer, "commit", restart)
    with pytest.raises(CommitUnknown):
        _claim(other, job)
    other.close()
    [shard] = world.shards(job)
    assert (shard.state, shard.attempt_no) == (ShardState.READY, 0)
    assert _halves(world) == []
    world.worker()
    world.wait(job, JobState.COMPLETED)
    assert world.attempt_states(job) == [AttemptState.SUCCEEDED]
    world.check(job)


def test_12_restarted_after_the_claim_is_committed(world: World, server: servers.Server) -> None:
    """Fault 12: the claim is committed, its answer is lost and the server restarts. The shard is claimed, then lost."""
    job = world.submit()
    with wire(server.port) as line:
        url = sa.make_url(str(world.settings.database_url)).set(port=line.port)
        other = Database(url.render_as_string(hide_password=False))
        line.plan(Cut.AFTER, b"INSERT INTO attempt")
        with pytest.raises(CommitUnknown):
            _claim(other, job)
        assert line.cuts == 1
        other.close()
    server.stop()
    server.start()
    [shard] = world.shards(job)
    assert (shard.state, shard.attempt_no) == (ShardState.RUNNING, 1)
    assert _halves(world) == []
    world.worker()
    world.wait(job, JobState.COMPLETED)
    assert world.attempt_states(job) == [AttemptState.LOST, AttemptState.SUCCEEDED]
    world.check(job)


def _committed(world: World, job: str, shards: int) -> bool:
    return len(world.rows("shard", job_id=job, state=ShardState.COMMITTED)) >= shards


def test_12_restarted_under_workers(world: World, server: servers.Server) -> None:
    """Fault 12: the server restarts again and again under two workers that claim and commit all the time.

    Whatever it cut off, every shard is claimed or ready, never half, and nothing flushed is computed twice.
    """
    job = world.submit(shard_rows=2)
    workers = [world.worker(), world.worker()]
    for committed in (10, 30, 50, 70):
        wait_until(partial(_committed, world, job, committed), f"{committed} committed shards")
        server.stop()
        server.start()
        assert _halves(world) == []
    world.wait(job, JobState.COMPLETED)
    assert _halves(world) == []
    world.check(job)
    assert [worker.end() for worker in workers] == [0, 0]


def test_13_down_for_longer_than_a_lease(world: World, server: servers.Server, tmp_path: Path) -> None:
    """Fault 13: the database is away for longer than a lease. Nobody is reaped when it is back: the leases are renewed.

    The workers stand still until a reaper has been there first, when every lease has run out.
    """
    world.replace_settings(lease_seconds=4.0)
    gate = tmp_path / "gate"
    job = world.submit(shard_rows=100, engine_options={"gate_file": str(gate), "gate_after_rows": 25})
    workers = [world.worker(), world.worker()]
    wait_until(lambda: [shard.n_done for shard in world.shards(job)] == [20, 20], "two attempts at the gate")
    server.stop()
    for worker in workers:
        worker.signal(signal.SIGSTOP)
        wait_stopped(worker)
    lease_until = time.time() + world.settings.lease_seconds  # at the latest; the server shares this machine's clock
    wait_until(lambda: time.time() > lease_until, "the end of every lease")
    server.start()
    assert reap(world.client._runtime) == Reaped(ready=0, failed=0)
    for worker in workers:
        worker.signal(signal.SIGCONT)
    wait_until(lambda: _age(world) > world.settings.lease_seconds, "the end of the reaper's patience")
    assert reap(world.client._runtime) == Reaped(ready=0, failed=0)
    assert world.attempt_states(job) == [AttemptState.RUNNING, AttemptState.RUNNING]
    assert all(shard.lease_until > lease_until for shard in world.shards(job))
    gate.touch()
    world.wait(job, JobState.COMPLETED)
    assert world.attempt_states(job) == [AttemptState.SUCCEEDED, AttemptState.SUCCEEDED]
    assert world.events(job, "shard.running") == 2
    world.check(job)


def _age(world: World) -> float:
    """Seconds since the server started, by its own clock."""
    started = sa.cast(sa.extract("epoch", sa.func.pg_postmaster_start_time()), sa.Double)
    with world.database.read() as connection:
        return float(connection.execute(sa.select(now() - started)).scalar_one())
