"""The fault tests can see what they guard: without the attempt fence a zombie does damage, and they go red."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from storage.errors import RowmillError
from storage.queue import attempts, jobs, reaper
from storage.records import Claim
from storage.sql import tables
from storage.sql.database import Database
from tests.storage.conftest import database as database
from tests.storage.jobs_in_sql import expire_lease, output, part, planned_job, stored, take
from tests.storage.queue import test_attempts


def no_fence(database: Database, connection: sa.Connection, claim: Claim) -> sa.Row[Any]:
    """In place of ``storage.queue.attempts.held_row``: the shard's row, whoever holds it, in any state."""
    query = sa.select(tables.shard).where(tables.shard.c.id == claim.shard.id)
    return connection.execute(database.locked(query)).one()


def zombie_scenario(database: Database) -> dict[str, Any]:
    """An attempt is reaped while it stands still, and comes back beside its successor: who got in, and what is left."""
    job = planned_job(database, shards=2)
    zombie = take(database, job)
    expire_lease(database, zombie)
    assert reaper.reap(database, lease_seconds=0.0, max_losses=8, actor="reaper").ready == 1
    fresh = take(database, job)
    assert (fresh.shard.id, fresh.attempt_no) == (zombie.shard.id, 2)
    accepted = []
    for name, claim in (("fresh", fresh), ("zombie", zombie)):
        try:
            attempts.flush(database, claim, part(claim, list(range(10))), tokens={"prompt_tokens": 5})
            accepted.append(f"flush of {name}")
        except RowmillError:
            pass
    for name, claim in (("zombie", zombie), ("fresh", fresh)):
        try:
            attempts.commit(database, claim, output(claim), stats={})
            accepted.append(f"commit of {name}")
        except RowmillError:
            pass
    row = stored(database, "shard", id=zombie.shard.id)[0]
    done = jobs.get(database, job.id)
    return {
        "accepted": accepted,
        "committed": row.committed_attempt,
        "attempts": [item.state for item in stored(database, "attempt", shard_id=row.id)],
        "prompt_tokens": done.tokens["prompt_tokens"],
        "rows": (done.rows_done, done.n_open),
    }


def test_with_the_fence_a_zombie_does_nothing(database: Database) -> None:
    """Faults 5 and 6 in SQL, as the yardstick for the next test."""
    assert zombie_scenario(database) == {
        "accepted": ["flush of fresh", "commit of fresh"],
        "committed": 2,
        "attempts": ["superseded", "succeeded"],
        "prompt_tokens": 5,
        "rows": (10, 1),
    }


def test_without_the_fence_a_zombie_does_damage(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, the fence taken out: the reaped attempt wins, its tokens count twice, its successor is shut out."""
    monkeypatch.setattr(attempts, "held_row", no_fence)
    after = zombie_scenario(database)
    assert after["accepted"] == ["flush of fresh", "flush of zombie", "commit of zombie"]
    assert after["committed"] == 1
    assert after["attempts"] == ["lost", "running"]
    assert after["prompt_tokens"] == 10


@pytest.mark.parametrize(
    "guarded", [test_attempts.test_a_zombie_is_fenced_after_the_reaper], ids=lambda test: test.__name__
)
def test_without_the_fence_the_fault_tests_fail(
    database: Database, monkeypatch: pytest.MonkeyPatch, guarded: Any
) -> None:
    """A test of fault 6, run without the fence, is red."""
    monkeypatch.setattr(attempts, "held_row", no_fence)
    with pytest.raises((AssertionError, pytest.fail.Exception, RowmillError)):
        guarded(database)
