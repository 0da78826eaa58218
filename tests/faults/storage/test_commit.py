"""Faults 14 to 19: what may come between a transaction and its outcome, and who races whom."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from pipeline.worker.worker import Worker
from storage.errors import RowmillError, Unreachable
from storage.queue import attempts as shards
from storage.queue import claims, jobs
from storage.queue import reaper as reaping
from storage.records import Claim, Job
from storage.sql import tables
from storage.sql.database import Database
from storage.states import AttemptState, JobState, ShardState
from tests.faults.conftest import make_settings
from tests.faults.driver import KILLED, World, wait_until
from tests.faults.sabotage import sabotaged, work
from tests.faults.wire import Cut, Wire, wire
from tests.storage.jobs_in_sql import OWNER, output, part, planned_job, stored, take

FLUSH, COMMIT = b"INSERT INTO part_file", b"committed_attempt="
CLAIM, COMPLETE = b"INSERT INTO attempt", b"ended_at=CAST(extract"


@pytest.fixture
def postgres_world(postgres_database: str, tmp_path: Path, cache_dir: Path) -> Iterator[World]:
    made = World(make_settings(tmp_path, cache_dir, postgres_database), tmp_path)
    yield made
    made.close()


@pytest.fixture
def cable(postgres_database: str) -> Iterator[Wire]:
    """The proxy before the PostgreSQL server. A late COMMIT lands when another transaction waits for its locks."""
    direct = sa.make_url(postgres_database)
    assert direct.port is not None
    with wire(direct.port) as made:
        made.landing = lambda: wait_for_lock_waiters(postgres_database, 1)
        yield made


def through(cable: Wire, url: str) -> str:
    return sa.make_url(url).set(port=cable.port).render_as_string(hide_password=False)


def wait_for_lock_waiters(url: str, count: int) -> None:
    """Until so many transactions of this database wait for a lock that another holds."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    query = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    try:
        with engine.connect() as connection:
            wait_until(lambda: connection.execute(query).scalar_one() >= count, f"{count} transactions that wait")
    finally:
        engine.dispose()


# -- 14: the connection breaks during COMMIT


@pytest.mark.postgres
@pytest.mark.parametrize("cut", list(Cut))
def test_14_reading_again_decides_a_broken_commit(cable: Wire, postgres_database: str, cut: Cut) -> None:
    """Fault 14: the counters move once, whether the COMMIT was lost, its answer was, or it lands while we ask again."""
    direct, database = Database(postgres_database), Database(through(cable, postgres_database))
    job = planned_job(direct, shards=1)
    claim = take(database, job)
    cable.plan(cut, COMMIT)
    if cut is Cut.AFTER:
        assert shards.commit(database, claim, output(claim), stats={}) is JobState.FINALIZING
    else:
        with pytest.raises(Unreachable, match="did not take effect"):
            shards.commit(database, claim, output(claim), stats={})
        [shard] = stored(direct, "shard")
        assert (shard.state, shard.committed_attempt) == (ShardState.RUNNING, None)
    assert cable.cuts == 1
    # Asking again is always safe; here the late COMMIT lands while this one waits for its lock.
    assert shards.commit(database, claim, output(claim), stats={}) is JobState.FINALIZING
    [shard], [done] = stored(direct, "shard"), stored(direct, "job")
    assert (shard.state, shard.committed_attempt) == (ShardState.COMMITTED, 1)
    assert (done.n_open, done.state) == (0, JobState.FINALIZING)
    assert len(stored(direct, "event", type="shard.committed")) == 1
    assert len(stored(direct, "event", type="job.finalizing")) == 1
    assert len(stored(direct, "part_file")) == 1
    database.close()
    direct.close()


@pytest.mark.postgres
@pytest.mark.parametrize("cut", list(Cut))
@pytest.mark.parametrize("marker", [FLUSH, COMMIT], ids=["flush", "commit"])
def test_14_an_attempt_outlives_a_broken_commit(postgres_world: World, cable: Wire, marker: bytes, cut: Cut) -> None:
    """Fault 14, at the worker: a flush or commit whose COMMIT broke costs neither an attempt nor a computed row."""
    world = postgres_world
    job = world.submit(shard_rows=74)
    url = through(cable, str(world.settings.database_url))
    worker = Worker(world.settings.model_copy(update={"database_url": url}))
    try:
        cable.plan(cut, marker)
        while world.job(job).n_open:
            worker.run("fake")
        worker.finalize()
    finally:
        worker.close()
    assert cable.cuts == 1
    shards_ = world.shards(job)
    assert world.attempt_states(job) == [AttemptState.SUCCEEDED] * len(shards_)
    assert {(shard.n_fail, shard.n_lost) for shard in shards_} == {(0, 0)}
    world.check(job)


@pytest.mark.postgres
@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER])
@pytest.mark.parametrize("marker", [CLAIM, COMPLETE], ids=["claim", "complete"])
def test_14_a_broken_claim_or_completion_is_made_good(
    postgres_world: World, cable: Wire, marker: bytes, cut: Cut
) -> None:
    """Fault 14, elsewhere: a claim nobody knows of is lost after its lease; a completion is tried again or was done."""
    world = postgres_world
    job = world.submit()
    url = through(cable, str(world.settings.database_url))
    worker = Worker(world.settings.model_copy(update={"database_url": url}))

    def round_again() -> bool:
        with suppress(RowmillError):
            worker.tick()
            worker.run("fake")
            worker.finalize()
        return world.job(job).state is JobState.COMPLETED

    try:
        cable.plan(cut, marker)
        wait_until(round_again, "the end of the job")
    finally:
        worker.close()
    assert cable.cuts == 1
    lost = [AttemptState.LOST] if (marker, cut) == (CLAIM, Cut.AFTER) else []
    assert world.attempt_states(job) == [*lost, AttemptState.SUCCEEDED]
    world.check(job)


def test_14_killed_before_the_answer_to_a_commit(world: World) -> None:
    """Fault 14 on every database: a worker that dies knowing nothing of its COMMIT's outcome leaves it standing."""
    job = world.submit(shard_rows=74)
    assert world.worker(arm={"commit.done": "exit@2"}).join() == KILLED
    states = [shard.state for shard in world.shards(job)]
    assert states[:2] == ["committed", "committed"] and set(states[2:]) == {"ready"}
    assert world.job(job).n_open == len(states) - 2
    with world.worker():
        world.wait(job, JobState.COMPLETED)
    assert world.attempt_states(job) == [AttemptState.SUCCEEDED] * len(states)
    world.check(job)


def test_14_killed_before_the_commit(world: World) -> None:
    """Fault 14: everything is flushed and assembled, and the COMMIT never began: nothing is computed again."""
    job = world.submit(shard_rows=111)
    assert world.worker(arm={"commit.assembled": "exit"}).join() == KILLED
    with world.worker():
        world.wait(job, JobState.COMPLETED)
    lost, again, *_ = world.attempts(job)
    assert (lost.state, lost.rows_computed) == (AttemptState.LOST, world.shards(job)[0].row_n)
    assert (again.state, again.rows_resumed, again.rows_computed) == (AttemptState.SUCCEEDED, lost.rows_computed, 0)
    world.check(job)


# -- 15: clocks that disagree


def test_15_the_clocks_of_workers_do_not_matter(world: World, tmp_path: Path) -> None:
    """Fault 15: two workers an hour ahead and an hour behind, each jumping to the other side while it holds a shard.

    For longer than a lease both hold theirs, reap and look for expired jobs. Nobody loses anything, and every time in
    the database is by the database's clock.
    """
    gate = tmp_path / "gate"
    options = {"gate_file": str(gate), "gate_after_rows": 10}
    before = world.database.clock()
    job = world.submit(shard_rows=74, completion_window="30m", engine_options=options)
    sabotaged(world, {"clock": [3600.0, -3600.0]})
    sabotaged(world, {"clock": [-3600.0, 3600.0]})
    world.wait_for_flushes(job, 20)
    end = world.database.clock() + 2 * world.settings.lease_seconds

    def leases_hold() -> bool:
        running = [shard for shard in world.shards(job) if shard.state == ShardState.RUNNING]
        now = world.database.clock()
        assert len(running) == 2
        assert all(shard.lease_until <= now + world.settings.lease_seconds for shard in running)
        return now > end

    wait_until(leases_hold, "twice the time of a lease")
    gate.touch()
    world.wait(job, JobState.COMPLETED)
    after = world.database.clock()
    attempts = world.attempts(job)
    assert {attempt.state for attempt in attempts} == {AttemptState.SUCCEEDED}
    assert len({attempt.worker_id for attempt in attempts}) == 2
    times = [event.at for event in world.rows("event", job_id=job)]
    times += [at for row in world.rows("attempt") for at in (row.started_at, row.ended_at)]
    times += [at for row in world.rows("job") for at in (row.created_at, row.started_at, row.ended_at)]
    assert before <= min(times) and max(times) <= after
    world.check(job)


# -- 16 and 17: two of them at once


def at_once(world: World, job_id: str, go: Callable[[], object], processes: int) -> None:
    """``go`` sets the processes off; on PostgreSQL none gets the job's lock before all of them wait for it."""
    if world.database.sqlite:
        go()
        return
    with world.database.write() as connection:
        query = sa.select(tables.job.c.id).where(tables.job.c.id == job_id)
        connection.execute(world.database.locked(query)).one()
        go()
        wait_for_lock_waiters(str(world.settings.database_url), processes)


def test_16_two_reapers(world: World, tmp_path: Path) -> None:
    """Fault 16: two processes tick over the same lost shards and the same expired job: each moves on once.

    Of schedules, which two beats must fire once each: see ``control/test_schedules.py``.
    """
    late = world.submit(output=str(tmp_path / "late"))
    job = world.submit(shard_rows=37)
    lost = [take(world.database, world.job(job), "gone", 3600.0) for _ in world.shards(job)]
    reapers = [world.start("worker", {"queue": "another"}, None, {}) for _ in range(2)]
    wait_until(lambda: len(world.rows("worker")) == 2, "two workers")

    def expire() -> None:
        with world.database.write() as connection:
            shard, table = tables.shard, tables.job
            connection.execute(shard.update().where(shard.c.job_id == job).values(lease_until=1.0))
            connection.execute(table.update().where(table.c.id == late).values(expires_at=1.0))

    at_once(world, job, expire, 2)
    world.wait(late, JobState.EXPIRED)
    wait_until(lambda: {shard.state for shard in world.shards(job)} == {ShardState.READY}, "the shards")
    assert [reaper.end() for reaper in reapers] == [0, 0]
    assert world.events(job, "shard.ready") == len(lost)
    assert {(shard.n_lost, shard.attempt_no) for shard in world.shards(job)} == {(1, 1)}
    assert world.attempt_states(job) == [AttemptState.LOST] * len(lost)
    assert [world.events(late, kind) for kind in ("job.cancelling", "job.expired")] == [1, 1]


def test_17_the_last_two_shards_commit_together(world: World, tmp_path: Path) -> None:
    """Fault 17: two processes commit a job's last two shards at the same moment: one of them moves the job on."""
    job = world.submit(shard_rows=111)
    assert len(world.shards(job)) == 2
    gates = [tmp_path / "one", tmp_path / "other"]
    for gate in gates:
        world.worker(arm={"commit.assembled": f"wait:{gate}"})
    for gate in gates:
        wait_until(Path(f"{gate}.reached").exists, "two attempts that are about to commit")

    def go() -> None:
        for gate in gates:
            gate.touch()

    at_once(world, job, go, 2)
    world.wait(job, JobState.COMPLETED)
    assert world.events(job, "job.finalizing") == 1
    world.check(job)


# -- 18 and 19: cancelling


def deadlocks(database: Database) -> int:
    """How many PostgreSQL has broken in this database so far. (SQLite has one writer, and so none.)"""
    if database.sqlite:
        return 0
    with database.read() as connection:
        connection.execute(sa.text("SELECT pg_stat_force_next_flush()"))
        query = sa.text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        return int(connection.execute(query).scalar_one())


def test_18_cancel_races_everything(database_url: str) -> None:
    """Fault 18: cancels, commits, flushes, heartbeats, claims and reapers at the same moment, in as many threads.

    Every commit is accepted, every other shard cancelled, each counted once; nobody waits for another in a ring.
    """
    database = Database(database_url)
    for _ in range(3):
        job = planned_job(database, shards=14)
        held = [take(database, job) for _ in range(8)]
        keys = [(claim.shard.id, claim.attempt_no) for claim in held]
        start, errors = threading.Barrier(15), list[BaseException]()

        def commit(claim: Claim) -> None:
            shards.flush(database, claim, part(claim, list(range(10))), tokens={"prompt_tokens": 1})
            shards.commit(database, claim, output(claim), stats={})

        def heartbeats(keys: list[tuple[str, int]] = keys) -> None:
            for _ in range(20):
                claims.heartbeat(database, keys, owner=OWNER, lease_seconds=60.0)

        def claim_one(job: Job = job) -> None:
            mine = claims.claim(database, owner="late", lease_seconds=60.0, job_id=job.id)
            if mine is not None:
                commit(mine)

        calls: list[Callable[[], object]] = [partial(commit, claim) for claim in held]
        calls += [partial(jobs.request_stop, database, job.id, "cancelled", actor="test")] * 3
        calls += [heartbeats, partial(reaping.reap, database, lease_seconds=0.0, max_losses=8, actor="test")]
        calls += [claim_one, claim_one]

        def run(
            call: Callable[[], object], start: threading.Barrier = start, errors: list[BaseException] = errors
        ) -> None:
            start.wait()
            try:
                call()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        while jobs.cancel_ready(database, job.id, actor="test"):
            pass
        states = [shard.state for shard in stored(database, "shard", job_id=job.id)]
        assert set(states) <= {ShardState.COMMITTED, ShardState.CANCELLED}
        committed = states.count(ShardState.COMMITTED)
        assert committed >= len(held)
        done = jobs.get(database, job.id)
        assert (done.state, done.n_open, done.rows_done) == (JobState.CANCELLING, 0, 10 * committed)
        assert done.tokens["prompt_tokens"] == committed
        assert len(stored(database, "event", job_id=job.id, type="shard.committed")) == committed
        assert len(stored(database, "event", job_id=job.id, type="job.cancelling")) == 1
    assert deadlocks(database) == 0
    database.close()


@pytest.mark.postgres
def test_18_a_flush_does_not_wait_for_the_job(postgres_database: str) -> None:
    """Fault 18: what locks a shard alone waits for nobody who has locked its job and may be waiting for a shard.

    (Its event refers to the job: with a lock that keeps foreign keys away, heartbeat, flush and commit were a ring.)
    """
    database = Database(postgres_database)
    impatient = sa.make_url(postgres_database).update_query_dict({"options": "-c lock_timeout=5s"})
    other = Database(impatient.render_as_string(hide_password=False))
    job = planned_job(database, shards=3)
    one, two, three = (take(database, job) for _ in range(3))
    with database.write() as connection:
        connection.execute(database.locked(sa.select(tables.job.c.id).where(tables.job.c.id == job.id))).one()
        shards.flush(other, one, part(one, [0]), tokens={})
        shards.release(other, two)
        claims.heartbeat(other, [(three.shard.id, three.attempt_no)], owner=OWNER, lease_seconds=60.0)
        assert claims.claim(other, owner=OWNER, lease_seconds=60.0, job_id=job.id) is not None
    database.close()
    other.close()


@pytest.mark.parametrize("first", ["commit", "cancel"])
def test_18_a_worker_that_commits_while_its_job_is_cancelled(world: World, tmp_path: Path, first: str) -> None:
    """Fault 18, in a worker: whichever comes first, the finished shard is in the partial output, and once."""
    gate = tmp_path / "gate"
    job = world.submit(shard_rows=111)
    world.worker(arm={"commit.assembled" if first == "cancel" else "commit.done": f"wait:{gate}"})
    wait_until(Path(f"{gate}.reached").exists, "the first commit")
    jobs.request_stop(world.database, job, "cancelled", actor="test")
    gate.touch()
    ended = world.wait(job, JobState.CANCELLED)
    committed, cancelled = world.shards(job)
    assert (committed.state, cancelled.state) == (ShardState.COMMITTED, ShardState.CANCELLED)
    assert (ended.rows_done, ended.n_open) == (committed.row_n, 0)
    assert world.published().column("id").to_pylist() == list(range(committed.row_n))
    assert not (world.output / "_SUCCESS").exists()


def test_19_cancel_before_any_worker(world: World) -> None:
    """Fault 19: nobody has ever worked on the job. It ends cancelled at once, and nothing is published."""
    job = world.submit(shard_rows=74)
    assert world.client.job(job).cancel().state is JobState.CANCELLED
    assert {shard.state for shard in world.shards(job)} == {ShardState.CANCELLED}
    assert world.events(job, "job.cancelled") == 1
    assert [path for path in world.output.rglob("*") if path.is_file()] == []


def test_19_cancel_after_the_worker_died(world: World) -> None:
    """Fault 19: the only worker was killed. What it had flushed is published as partial, and the job ends cancelled."""
    world.replace_settings(lease_seconds=600.0)
    job = world.submit(shard_rows=111)
    assert world.worker(arm={"flush.recorded": "exit@3"}).join() == KILLED
    assert world.client.job(job).cancel().state is JobState.CANCELLED
    assert world.published().column("id").to_pylist() == list(range(30))
    assert json.loads((world.output / "_manifest.json").read_text())["partial"] is True
    assert not (world.output / "_SUCCESS").exists()


def test_19_cancelled_while_its_worker_was_dead(world: World) -> None:
    """Fault 19: cancelled in the database alone, after the worker died. The next worker ends it without running it."""
    job = world.submit(shard_rows=111)
    assert world.worker(arm={"flush.recorded": "exit@3"}).join() == KILLED
    jobs.request_stop(world.database, job, "cancelled", actor="test")
    work(world, job)
    assert world.job(job).state is JobState.CANCELLED
    assert world.attempt_states(job) == [AttemptState.LOST]
    assert {shard.state for shard in world.shards(job)} == {ShardState.CANCELLED}
    assert world.published().column("id").to_pylist() == list(range(30))
