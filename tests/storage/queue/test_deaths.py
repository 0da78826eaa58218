"""What an attempt was at when its worker died decides what that costs, on every database."""

from __future__ import annotations

import pytest
from pyroaring import BitMap

from storage.deaths import Step
from storage.errors import LeaseLost
from storage.queue import attempts, jobs, reaper
from storage.records import Claim, Job
from storage.sql.database import Database
from storage.states import JobState, ShardState
from tests.storage.jobs_in_sql import OWNER, part, planned_job, stored, take


def die(database: Database, max_losses: int = 3) -> None:
    reaper.reap_owners(database, [OWNER], max_losses=max_losses, actor="test")


def lose(database: Database, job: Job, step: Step, alone: BitMap | None = None, *, max_losses: int = 3) -> Claim:
    claim = take(database, job)
    attempts.note(database, claim, step, alone)
    die(database, max_losses)
    return claim


def counters(database: Database, claim: Claim) -> tuple[int, int]:
    [shard] = stored(database, "shard", id=claim.shard.id)
    return shard.n_lost, shard.n_crash


@pytest.mark.parametrize("step", [Step.LOADING, Step.IDLE, Step.FINISHING])
def test_deaths_with_no_row_inside_fail_the_job_and_say_where(database: Database, step: Step) -> None:
    job = planned_job(database, shards=2)
    for number in range(1, 4):
        claim = lose(database, job, step)
        assert counters(database, claim) == (number, 0)
    [shard] = stored(database, "shard", id=claim.shard.id)
    assert (shard.state, shard.suspect) == (ShardState.FAILED, None)
    assert step.phrase in shard.error
    found = jobs.get(database, job.id)
    # The other shard would end in the same way.
    assert (found.state, found.stop_reason, found.n_failed_shards) == (JobState.CANCELLING, "failed", 1)
    assert found.error == f"its worker died {step.phrase}, 3 times in a row"
    assert {attempt.error for attempt in stored(database, "attempt")} == {f"its worker died {step.phrase}"}


def test_a_job_that_has_computed_rows_loses_the_shard_alone(database: Database) -> None:
    job = planned_job(database, shards=2)
    claim = take(database, job)
    attempts.flush(database, claim, part(claim, [0]), tokens={})
    for _ in range(4):
        die(database)
        claim = take(database, job)
    assert jobs.get(database, job.id).state is JobState.IN_PROGRESS
    assert claim.shard.idx == 1


def test_whoever_waits_for_another_shard_pays_nothing(database: Database) -> None:
    job = planned_job(database, shards=1)
    for _ in range(10):
        claim = lose(database, job, Step.WAITING)
    assert counters(database, claim) == (0, 0)


def test_only_rows_that_were_inside_alone_are_suspected(database: Database) -> None:
    job = planned_job(database, shards=1)
    for _ in range(3):
        claim = lose(database, job, Step.COMPUTING)
    assert counters(database, claim) == (3, 3)
    assert take(database, job).shard.suspect is None
    die(database, 8)
    lose(database, job, Step.COMPUTING, BitMap([4, 5]), max_losses=8)
    claim = lose(database, job, Step.IDLE, max_losses=8)
    assert claim.shard.suspect == BitMap([4, 5])
    claim = lose(database, job, Step.COMPUTING, BitMap([5]), max_losses=8)
    assert claim.shard.suspect == BitMap([4, 5]), "a death with no row inside says nothing of them"
    assert take(database, job).shard.suspect == BitMap([5])


def test_a_row_that_is_given_up_is_no_progress(database: Database) -> None:
    job = planned_job(database, shards=1)
    claim = take(database, job)
    attempts.note(database, claim, Step.COMPUTING)
    attempts.flush(database, claim, part(claim, [0], failed=(0,)), tokens={}, n_poison=1)
    die(database)
    assert counters(database, claim) == (1, 1)
    claim = take(database, job)
    attempts.note(database, claim, Step.COMPUTING)
    attempts.flush(database, claim, part(claim, [1]), tokens={})
    die(database)
    assert counters(database, claim) == (0, 0)


def test_an_engine_that_every_row_kills_is_given_up(database: Database) -> None:
    """The worker lives and says so: searches that end without a computed row are counted, too."""
    job = planned_job(database, shards=1)

    def crash(alone: BitMap | None = None, *, convicted: bool = False) -> ShardState:
        claim = take(database, job)
        if convicted:
            attempts.end_search(database, claim)
        attempts.note(database, claim, Step.COMPUTING, alone)
        return attempts.fail(database, claim, "it died", delay=0.0, max_failures=4, max_losses=3, crash=True)

    states = [crash() for _ in range(3)]
    for row in range(3):
        states += [crash(BitMap([row])), crash(convicted=True)]
    assert states == [ShardState.READY] * 8 + [ShardState.FAILED]


def test_a_note_of_an_attempt_that_is_over_is_refused(database: Database) -> None:
    job = planned_job(database, shards=1)
    claim = lose(database, job, Step.LOADING)
    with pytest.raises(LeaseLost):
        attempts.note(database, claim, Step.COMPUTING)
