"""Text that PostgreSQL or UTF-8 cannot hold is stored as an escape, wherever it comes from, and never raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import NotFound
from storage.fleet import job_lookup
from storage.queue import attempts, jobs
from storage.records import RowException
from storage.sql import column_types, tables
from storage.sql.database import Database
from storage.states import JobState, ShardState
from storage.storable import storable, storable_json
from tests.storage.jobs_in_sql import part, planned_job, stored, take

BAD = "a\0b\udc80c"
GOOD = r"a\x00b\udc80c"


@given(st.text(st.characters(exclude_categories=[])))
def test_storable_text_is_utf8_without_nul(text: str) -> None:
    found = storable(text)
    assert "\0" not in found
    assert found.encode().decode() == found
    assert storable(found) == found
    if "\0" not in text and not any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        assert found == text


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=[])), inner),
)


@given(_VALUES)
def test_storable_json_is_strict_json(value: Any) -> None:
    text = json.dumps(storable_json(value), ensure_ascii=False, allow_nan=False)
    assert "\\u0000" not in text
    text.encode()


def test_every_column_of_text_takes_any_text() -> None:
    """A column of another type would raise for a NUL on PostgreSQL alone."""
    safe = (column_types.Text, column_types.Json, column_types.Rows)
    plain = [
        str(column)
        for table in tables.metadata.sorted_tables
        for column in table.columns
        if not isinstance(column.type, safe) and isinstance(column.type, (sa.String, sa.JSON, sa.TypeDecorator))
    ]
    # PostgreSQL's JSON, unlike its JSONB, keeps the escapes as they were given.
    exact = ["batch.metadata", "job.model", "job.plan", "job.spec", "schedule.spec", "source.partition"]
    assert sorted(plain) == exact


def test_a_job_takes_any_text(database: Database) -> None:
    spec = {"prompt": "a\0b", "engine_options": {"x\0": ["\0"]}}
    job = planned_job(
        database, tenant=BAD, idempotency_key=BAD, spec=spec, output_uri=f"/{BAD}", engine_key=BAD, actor=BAD, shards=3
    )
    assert (job.tenant, job.idempotency_key, job.output_uri) == (GOOD, GOOD, f"/{GOOD}")
    assert jobs.get(database, job.id).spec == spec
    assert jobs.has_key(database, BAD, BAD)
    assert jobs.live_on_output(database, f"/{BAD}") == job
    assert job_lookup.listed(database, tenant=BAD) == [job]
    for lookup in (job_lookup.find, jobs.get):
        with pytest.raises(NotFound):
            lookup(database, BAD)


def test_an_attempt_takes_any_text(database: Database) -> None:
    job = planned_job(database, shards=2)
    claim = take(database, job)
    attempts.flush(
        database, claim, part(claim, [0], failed=(0,)), tokens={}, exceptions=[RowException(0, "bad_value", BAD)]
    )
    assert attempts.fail(database, claim, BAD, delay=0.0, max_failures=4, stats={BAD: float("nan")}) is ShardState.READY
    [attempt] = stored(database, "attempt")
    assert (attempt.error, attempt.stats) == (GOOD, {GOOD: "nan"})
    assert [row.message for row in stored(database, "row_exception")] == [GOOD]
    assert stored(database, "shard", id=claim.shard.id)[0].error == GOOD
    attempts.fail_job(database, take(database, job), BAD)
    assert jobs.get(database, job.id).error == GOOD
    assert {"reason": "failed", "error": GOOD} in [event.data for event in jobs.events(database, job.id)]


def test_a_plan_is_read_back_as_it_was(database: Database) -> None:
    """Names of columns and values of a partition must not change: rows are read by them."""
    plan = {"columns": ["\0", "\ud800", "é"]}
    job = planned_job(database)
    with database.write() as connection:
        connection.execute(tables.job.update().values(plan=plan))
        connection.execute(tables.source.update().values(partition={"a\0": "b\0"}))
    assert jobs.get(database, job.id).plan == plan
    assert take(database, job).sources[0].partition == {"a\0": "b\0"}


def test_a_refusal_takes_any_text(database: Database) -> None:
    job = planned_job(database)
    with database.write() as connection:
        connection.execute(tables.job.update().values(state=JobState.VALIDATING))
    jobs.refuse(database, job.id, f"no column {BAD!s}", actor=BAD)
    assert jobs.get(database, job.id).error == f"no column {GOOD}"
