"""Finding jobs: by parts of their ids, and under filters."""

from __future__ import annotations

import pytest

from storage.errors import NotFound
from storage.fleet import job_lookup
from storage.sql import tables
from storage.sql.database import Database
from storage.states import JobState
from tests.storage.jobs_in_sql import planned_job, unplanned_job


def test_a_job_is_found_by_the_beginning_or_the_end_of_its_id(database: Database) -> None:
    job, other = planned_job(database), planned_job(database)
    shared = next(n for n in range(36) if job.id[n] != other.id[n])
    for part in (job.id, job.id[: shared + 1], job.id[-8:], job.id[-13:]):
        assert job_lookup.find(database, part).id == job.id
    with pytest.raises(NotFound, match=f"more than one job .*{job.id}"):
        job_lookup.find(database, job.id[:shared])
    for nobody in ("%", "_" * 36, job.id[1:5] + "zz", ""):
        with pytest.raises(NotFound):
            job_lookup.find(database, nobody)


def test_short_ids_stay_unambiguous(database: Database) -> None:
    alike = ["01a22c61-139b-77f5-b424-a35eaecc52ff", "01a22c61-139b-77f5-b424-b35faecc52ff"]
    twins = ["01a22c61-139b-77f5-b424-000000000001", "01a22c61-139b-77f6-b424-000000000001"]
    begins = "aabbccdd-139b-77f5-b424-000000000002"
    ends = "01a22c61-139b-77f5-b424-0000aabbccdd"
    for job_id in (*alike, *twins, begins, ends):
        unplanned_job(database, id=job_id)
    short = job_lookup.short_ids(database, [*alike, *twins, begins, ends])
    assert [short[job_id] for job_id in alike] == ["a35eaecc52ff", "b35faecc52ff"]
    assert [short[job_id] for job_id in twins] == ["77f5-b424-000000000001", "77f6-b424-000000000001"]
    assert (short[begins], short[ends]) == ("00000002", "0000aabbccdd")
    assert all(job_lookup.find(database, text).id == job_id for job_id, text in short.items())
    # Those that are not on the page count, too.
    assert job_lookup.short_ids(database, alike[:1]) == {alike[0]: "a35eaecc52ff"}


def test_jobs_are_listed_under_filters(database: Database) -> None:
    ada = planned_job(database, tenant="ada", output_uri="/out/a_b/1")
    bob = planned_job(database, tenant="bob", output_uri="/out/a_b")
    other = planned_job(database, tenant="bob", output_uri="/out/aXb/2", shards=0)
    with database.write() as connection:
        for job, at in ((ada, 100.0), (bob, 200.0), (other, 300.0)):
            connection.execute(tables.job.update().where(tables.job.c.id == job.id).values(created_at=at))

    def ids(**filters: object) -> list[str]:
        return [job.id for job in job_lookup.listed(database, **filters)]  # type: ignore[arg-type]

    assert ids() == [other.id, bob.id, ada.id]
    assert ids(limit=1) == [other.id]
    assert ids(after=other.id) == [bob.id, ada.id]
    assert ids(tenant="bob") == [other.id, bob.id]
    assert ids(state=JobState.FINALIZING) == [other.id]
    assert ids(output_uri="/out/a_b") == [bob.id, ada.id]
    assert ids(output_uri="/out/a") == []
    assert ids(since=200.0) == [other.id, bob.id]
    assert ids(before=200.0) == [ada.id]
    assert ids(since=150.0, before=250.0, tenant="ada") == []
