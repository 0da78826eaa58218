"""A job's own transitions: submit, cancel, finalize, retry; and the migrations under them."""

from __future__ import annotations

import re
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from storage.errors import Conflict, IllegalTransition, InvalidSettings, LeaseLost, RowmillError, Unreachable
from storage.fleet import failures, reports
from storage.queue import attempts, claims, jobs, publish_leases, reopen
from storage.records import OUTPUT_SEQ, RowException
from storage.sql import revisions, row_mapping, tables
from storage.sql.database import Database
from storage.states import JobState, ShardState
from tests.storage.jobs_in_sql import LEASE, OWNER, output, part, planned_job, stored, take, unplanned_job


def finish(database: Database, job_id: str) -> JobState:
    claimed = publish_leases.claim_finalize(database, owner=OWNER, lease_seconds=LEASE, job_id=job_id)
    assert claimed is not None
    return publish_leases.complete(database, claimed, publish_leases.end_state(claimed), actor="test").state


def test_the_same_key_is_the_same_job(database: Database) -> None:
    job = planned_job(database, idempotency_key="k")
    values = {"id": "another", "spec": {}, "idempotency_key": "k", "output_uri": job.output_uri}
    assert unplanned_job(database, **values).id == job.id
    with pytest.raises(Conflict, match="belongs to job"):
        unplanned_job(database, **(values | {"spec_hash": "other"}))
    assert unplanned_job(database, **(values | {"tenant": "b", "output_uri": "/elsewhere"})).id == "another"


def test_a_name_that_is_no_column_is_refused(database: Database) -> None:
    row = {"job_id": planned_job(database).id, "type": "x", "at": 0.0, "actor": "a", "data": {}}
    with pytest.raises(ValueError, match="table 'event' has no column sharD"), database.write() as connection:
        row_mapping.insert(connection, tables.event, [row, row | {"sharD": "s"}])
    assert not stored(database, "event", type="x")


def test_two_live_jobs_cannot_share_an_output(database: Database) -> None:
    first = planned_job(database, output_uri="/out/shared")
    with pytest.raises(Conflict, match="is being written by job"):
        planned_job(database, output_uri="/out/shared")
    jobs.request_stop(database, first.id, "cancelled", actor="test")
    assert finish(database, first.id) is JobState.CANCELLED
    planned_job(database, output_uri="/out/shared")


def test_planning_twice_changes_nothing(database: Database) -> None:
    job = planned_job(database, shards=3)
    with pytest.raises(IllegalTransition):
        jobs.set_planned(database, job.id, plan={}, sources=[], shards=[], actor="test")
    assert len(stored(database, "shard")) == 3


def test_a_job_without_rows_needs_no_shard(database: Database) -> None:
    job = planned_job(database, shards=0)
    assert job.state is JobState.FINALIZING
    assert finish(database, job.id) is JobState.COMPLETED


def test_cancelling_works_with_no_worker(database: Database) -> None:
    job = planned_job(database, shards=3)
    jobs.request_stop(database, job.id, "cancelled", actor="test")
    assert jobs.request_stop(database, job.id, "cancelled", actor="test").stop_reason == "cancelled"
    assert finish(database, job.id) is JobState.CANCELLED
    with pytest.raises(IllegalTransition):
        jobs.request_stop(database, job.id, "cancelled", actor="test")
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE) is None


def test_a_job_being_cancelled_gives_out_no_shard(database: Database) -> None:
    job = planned_job(database, shards=2)
    with database.write() as connection:
        connection.execute(tables.job.update().where(tables.job.c.id == job.id).values(state=JobState.CANCELLING))
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE, job_id=job.id) is None


def _cancel(database: Database, job_id: str, start: threading.Barrier, errors: list[BaseException]) -> None:
    try:
        start.wait()
        jobs.request_stop(database, job_id, "cancelled", actor="test")
    except BaseException as error:
        errors.append(error)


def test_cancel_races_commit_in_one_order_or_the_other(database: Database) -> None:
    for _ in range(10):
        job = planned_job(database, shards=2)
        claim = take(database, job)
        start = threading.Barrier(2)
        errors: list[BaseException] = []

        def cancel(
            job_id: str = job.id, start: threading.Barrier = start, errors: list[BaseException] = errors
        ) -> None:
            try:
                start.wait()
                jobs.request_stop(database, job_id, "cancelled", actor="test")
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=cancel)
        thread.start()
        start.wait()
        attempts.commit(database, claim, output(claim), stats={})
        thread.join()
        assert errors == []
        assert jobs.get(database, job.id).n_open == 0
        assert finish(database, job.id) is JobState.CANCELLED


def test_only_one_finalizer_completes_the_job(database: Database) -> None:
    job = planned_job(database, shards=0)
    first = publish_leases.claim_finalize(database, owner="a", lease_seconds=-1.0, job_id=job.id)
    second = publish_leases.claim_finalize(database, owner="b", lease_seconds=LEASE, job_id=job.id)
    assert first is not None
    assert second is not None
    assert publish_leases.claim_finalize(database, owner="c", lease_seconds=LEASE, job_id=job.id) is None
    with pytest.raises(LeaseLost):
        publish_leases.renew(database, first, lease_seconds=LEASE)
    with pytest.raises(LeaseLost):
        publish_leases.complete(database, first, JobState.COMPLETED, actor="a")
    assert publish_leases.complete(database, second, JobState.COMPLETED, actor="b").state is JobState.COMPLETED


def test_retrying_failed_rows_makes_a_new_generation(database: Database) -> None:
    job = planned_job(database, shards=2)
    for failed in ((3, 4), ()):
        claim = take(database, job)
        exceptions = [RowException(row, "missing_value", "no text") for row in failed]
        attempts.flush(database, claim, part(claim, list(range(10)), failed=failed), tokens={}, exceptions=exceptions)
        attempts.commit(database, claim, output(claim, failed), stats={})
    assert finish(database, job.id) is JobState.COMPLETED
    assert [list(group[-1].failed) for group in failures.failing(database, job.id)] == [[3, 4]]
    again = reopen.reopen(database, job.id, failed_only=True, window_seconds=60, actor="test")
    assert (again.state, again.gen, again.n_open, again.rows_done, again.rows_failed) == (JobState.QUEUED, 1, 1, 18, 0)
    claim = take(database, job)
    assert list(claim.todo) == [3, 4]
    assert claim.previous_output is not None
    assert claim.previous_output.attempt_no == 1
    attempts.flush(database, claim, part(claim, [3, 4], failed=(4,)), tokens={})
    assert attempts.commit(database, claim, output(claim, (4,)), stats={}) is JobState.FINALIZING
    closed = list(publish_leases.finished_shards(database, job.id, page=1))
    assert [(item.shard.idx, item.shard.gen) for item in closed] == [(0, 1), (1, 0)]
    assert all(item.output is not None for item in closed)
    assert finish(database, job.id) is JobState.COMPLETED
    done = jobs.get(database, job.id)
    assert (done.rows_done, done.rows_failed) == (20, 1)
    ((first, newest),) = failures.failing(database, job.id)
    assert (list(first.failed), list(newest.failed)) == ([3, 4], [4])
    assert set(failures.exceptions(database, first.id)) == {3, 4}
    assert [file.seq for file in failures.files(database, newest.id)] == [0, OUTPUT_SEQ]
    assert reports.locate_row(database, done, 4).shard.gen == 1
    assert reports.locate_row(database, done, 5).shard.gen == 0


def test_retrying_reopens_what_was_given_up(database: Database) -> None:
    job = planned_job(database, shards=1)
    claim = take(database, job)
    attempts.flush(database, claim, part(claim, [0, 1]), tokens={})
    attempts.fail(database, claim, "no luck", delay=0.0, max_failures=1)
    assert finish(database, job.id) is JobState.FAILED
    again = reopen.reopen(database, job.id, failed_only=True, window_seconds=60, actor="test")
    assert (again.n_open, again.n_failed_shards, again.error) == (1, 0, None)
    claim = take(database, job)
    assert len(claim.todo) == 8
    assert stored(database, "shard")[0].n_fail == 0


def test_there_has_to_be_something_to_retry(database: Database) -> None:
    job = planned_job(database, shards=1)
    with pytest.raises(Conflict, match="only a job that has ended"):
        reopen.reopen(database, job.id, failed_only=True, window_seconds=60, actor="test")
    claim = take(database, job)
    attempts.commit(database, claim, output(claim), stats={})
    finish(database, job.id)
    with pytest.raises(Conflict, match="nothing to retry"):
        reopen.reopen(database, job.id, failed_only=True, window_seconds=60, actor="test")
    newer = planned_job(database, output_uri=job.output_uri, shards=0)
    finish(database, newer.id)
    with pytest.raises(Conflict, match="belongs to the newer job"):
        reopen.reopen(database, job.id, failed_only=False, window_seconds=60, actor="test")


def test_progress_counts_what_running_shards_have_flushed(database: Database) -> None:
    job = planned_job(database, shards=2)
    claim = take(database, job)
    attempts.flush(database, claim, part(claim, [1, 2], failed=(2,)), tokens={"prompt_tokens": 4})
    progress = reports.progress(database, jobs.get(database, job.id))
    assert (progress.rows_done, progress.rows_failed, progress.tokens["prompt_tokens"]) == (2, 1, 4)
    assert progress.shards == {ShardState.READY: 1, ShardState.RUNNING: 1}


def test_expired_jobs_are_found(database: Database) -> None:
    planned_job(database)
    late = planned_job(database, window_seconds=-1.0)
    assert jobs.expired(database) == [late.id]


def test_migrations_go_up_down_and_up_and_match_the_tables(database: Database) -> None:
    database.downgrade("base")
    assert database.revision() is None
    database.upgrade()
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, tables.metadata) == []


def _schema(path: Path) -> dict[str, set[str]]:
    """The columns, keys, checks and indexes of each table, as SQLite words them, in no order."""
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    plain = {name: re.sub(r"[\s\"]+", " ", sql).replace("DEFAULT (false)", "DEFAULT false") for name, sql in found}
    return {name: {part.strip(" ()") for part in re.split(r",(?![^()]*\))", sql)} for name, sql in plain.items()}


def test_a_new_embedded_database_is_what_the_migrations_make(tmp_path: Path) -> None:
    with closing(Database(f"sqlite:///{tmp_path}/migrated.db")) as migrated:
        migrated.upgrade()
    with closing(Database(f"sqlite:///{tmp_path}/made.db")) as made:
        made.ensure_schema()
        assert made.revision() == revisions.newest()
        assert _schema(tmp_path / "made.db") == _schema(tmp_path / "migrated.db")
        made.downgrade("base")
        made.ensure_schema()
        assert made.revision() == revisions.newest()


def test_another_programs_embedded_database_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE job (id TEXT)")
    with closing(Database(f"sqlite:///{tmp_path}/other.db")) as database:
        with pytest.raises(RowmillError, match="another program's"):
            database.ensure_schema()
        assert database.revision() is None


def test_files_of_migrations_are_named_after_their_revisions() -> None:
    scripts = [script.revision for script in ScriptDirectory(str(revisions.MIGRATIONS)).walk_revisions()]
    assert revisions.known() == scripts[::-1]
    assert revisions.before(scripts[0]) == scripts[1:] and revisions.before("nonsense") == []


def test_the_database_clock_moves_within_a_transaction(database: Database) -> None:
    first = database.clock()
    assert 1.7e9 < first <= database.clock()


@pytest.mark.postgres
def test_an_old_schema_on_a_server_is_refused(postgres_empty: str) -> None:
    database = Database(postgres_empty)
    with pytest.raises(RowmillError, match="rowmill db upgrade"):
        database.ensure_schema()
    database.upgrade()
    database.ensure_schema()
    database.close()


def test_bad_database_urls_are_refused(tmp_path: Path) -> None:
    for url, reason in (("nonsense", "not a database URL"), ("mysql://x/y", "mysql"), ("sqlite://", "file")):
        with pytest.raises(InvalidSettings, match=reason):
            Database(url)


def test_a_server_that_is_not_there_is_unreachable() -> None:
    database = Database("postgresql://postgres@127.0.0.1:9/nothing")
    with pytest.raises(Unreachable):
        database.clock()


def test_a_spec_keeps_the_order_of_its_keys(database: Database) -> None:
    """The properties of a JSON Schema are answered in their order, which PostgreSQL's JSONB would change."""
    spec = {"sampling": {"verdict": 1, "b": 2, "a": 3}}
    job = planned_job(database, spec=spec)
    assert list(jobs.get(database, job.id).spec["sampling"]) == ["verdict", "b", "a"]
