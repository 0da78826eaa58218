"""Who is next: priority, fair share, warm engines, longest due; and never more at work than a tenant may have."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.queue import attempts, claims, fair_queue, jobs, reaper
from storage.records import Claim
from storage.sql import tables
from storage.sql.database import Database, now
from storage.states import JobState
from storage.tenants import tenants
from tests.storage.jobs_in_sql import LEASE, OWNER, expire_lease, output, planned_job, stored


def nearest(database: Database, warm: tuple[str, ...] = (), owner: str = OWNER) -> Claim | None:
    return claims.claim(database, owner=owner, lease_seconds=LEASE, queues=["fake"], warm=warm)


def order(database: Database, count: int, warm: tuple[str, ...] = ()) -> list[str]:
    """The tenants of the next ``count`` claims."""
    found = [nearest(database, warm) for _ in range(count)]
    return [claim.job.tenant for claim in found if claim is not None]


def due_since(database: Database, job_id: str, seconds: float) -> None:
    with database.write() as connection:
        at = sa.select(now() - seconds).scalar_subquery()
        connection.execute(tables.shard.update().where(tables.shard.c.job_id == job_id).values(run_after=at))


def park(database: Database, names: str, seconds: float = -3600.0) -> None:
    """Nothing of these tenants is due any more, or all of it again."""
    with database.write() as connection:
        at = sa.select(now() - seconds).scalar_subquery()
        connection.execute(tables.shard.update().where(tables.shard.c.tenant.in_(list(names))).values(run_after=at))


def test_tenants_take_turns(database: Database) -> None:
    for name in "abc":
        planned_job(database, tenant=name, shards=4)
    assert order(database, 12) == list("abcabcabcabc")


def test_a_share_is_by_weight_and_by_rows(database: Database) -> None:
    tenants.add(database, "heavy", weight=3.0)
    planned_job(database, tenant="heavy", shards=12)
    planned_job(database, tenant="light", shards=12)
    assert Counter(order(database, 12)) == {"heavy": 9, "light": 3}
    planned_job(database, tenant="wide", shards=4, rows=40)
    planned_job(database, tenant="narrow", shards=12, rows=10)
    for name in ("heavy", "light"):
        tenants.change(database, name, max_running=0)
    assert Counter(order(database, 10)) == {"wide": 2, "narrow": 8}


def test_priority_goes_before_fairness(database: Database) -> None:
    planned_job(database, tenant="patient", shards=2)
    planned_job(database, tenant="urgent", shards=3, priority=1)
    assert order(database, 5) == ["urgent", "urgent", "urgent", "patient", "patient"]


def test_who_was_away_has_hoarded_nothing(database: Database) -> None:
    for name in "ab":
        planned_job(database, tenant=name, shards=20)
    order(database, 20)
    planned_job(database, tenant="late", shards=10)
    assert Counter(order(database, 9)) == {"late": 3, "a": 3, "b": 3}
    order(database, 100)
    planned_job(database, tenant="new", shards=6)
    planned_job(database, tenant="a", shards=6)
    assert Counter(order(database, 6))["new"] in (3, 4)  # "a" may still owe for the last shard that it was given


def test_who_was_held_back_has_hoarded_nothing(database: Database) -> None:
    tenants.add(database, "capped", max_running=1)
    for name in ("a", "b", "capped"):
        planned_job(database, tenant=name, shards=30)
    assert Counter(order(database, 13)) == {"a": 6, "b": 6, "capped": 1}
    tenants.change(database, "capped", max_running=None)
    assert Counter(order(database, 9)) == {"a": 3, "b": 3, "capped": 3}


def test_nobody_is_charged_who_kept_nobody_waiting(database: Database) -> None:
    planned_job(database, tenant="alone", shards=3)
    planned_job(database, tenant="elsewhere", shards=3, queue="onnx")
    order(database, 3)
    assert stored(database, "tenant_share") == []


@pytest.mark.parametrize("elsewhere", [{"queue": "onnx"}, {"priority": 5}])
def test_who_competes_elsewhere_has_no_say_here(database: Database, elsewhere: dict[str, Any]) -> None:
    """Others race for cheap rows in another queue, or at another priority, and carry its virtual time far ahead."""
    for name in "ab":
        planned_job(database, tenant=name, shards=20, rows=100_000, **elsewhere)
    planned_job(database, tenant="long", shards=20)
    planned_job(database, tenant="short", shards=6)

    def one(queue: str) -> str:
        claim = claims.claim(database, owner=OWNER, lease_seconds=LEASE, queues=[queue])
        assert claim is not None
        return claim.job.tenant

    found = []
    for _ in range(6):
        assert {one(elsewhere.get("queue", "fake")) for _ in range(2)} == {"a", "b"}
        if "priority" in elsewhere:
            park(database, "ab")
        found.append(one("fake"))
        park(database, "ab", 0.0)
    assert Counter(found) == {"long": 3, "short": 3}


def test_between_queues_the_longest_due_goes_first(database: Database) -> None:
    """However far the virtual time of one queue is ahead of the other's."""
    for name in "ab":
        planned_job(database, tenant=name, shards=3, rows=1000, queue="onnx")
        planned_job(database, tenant=name + name, shards=1, queue="vllm")
    for _ in range(4):
        claims.claim(database, owner=OWNER, lease_seconds=LEASE, queues=["onnx"])
    found = [claims.claim(database, owner=OWNER, lease_seconds=LEASE, queues=["onnx", "vllm"]) for _ in range(4)]
    assert [claim and claim.job.tenant for claim in found] == ["a", "aa", "b", "bb"]


def test_shares_are_kept_when_a_database_is_brought_up_to_date(database: Database) -> None:
    for name, rows in (("a", 10), ("b", 40)):
        planned_job(database, tenant=name, shards=4, rows=rows)
    planned_job(database, tenant="alone", queue="onnx")
    order(database, 3)
    before = {row.tenant: (row.vtime, row.vstart) for row in stored(database, "tenant_share")}
    assert len(before) == 2
    database.downgrade("0006")
    database.upgrade()
    assert {row.tenant: (row.vtime, row.vstart) for row in stored(database, "tenant_share")} == before


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    weights=st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * 3),
    steps=st.lists(
        st.one_of(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(1, 9)), st.just("claim")),
        max_size=8,
    ),
)
def test_two_who_both_wait_differ_by_one_shard_each_at_most(
    database: Database, weights: tuple[float, ...], steps: list[tuple[str, int, int] | str]
) -> None:
    """The fairness theorem of start-time fair queueing, over every stretch in which two tenants both had work ready."""
    with database.write() as connection:
        for table in (tables.job, tables.tenant, tables.tenant_share):
            connection.execute(table.delete())
    weight = dict(zip("abc", weights, strict=True))
    for name in "abc":
        tenants.add(database, name, weight=weight[name])
    ready = Counter[str]()
    largest: Counter[str] = Counter()
    served: list[tuple[frozenset[str], str, int]] = []  # who was waiting, who was served, rows
    for step in [("a", 3, 2), ("b", 3, 5), *steps, *["claim"] * 12]:
        if isinstance(step, tuple):
            name, count, rows = step
            planned_job(database, tenant=name, shards=count, rows=rows)
            ready[name] += count
            largest[name] = max(largest[name], rows)
            continue
        claim = nearest(database)
        waiting = frozenset(name for name in "abc" if ready[name])
        assert (claim is None) == (not waiting)
        if claim is not None:
            ready[claim.job.tenant] -= 1
            served.append((waiting, claim.job.tenant, claim.shard.row_n))
    for one, other in combinations("abc", 2):
        bound = largest[one] / weight[one] + largest[other] / weight[other]
        for start in range(len(served)):
            got = {one: 0.0, other: 0.0}
            for waiting, name, rows in served[start:]:
                if not {one, other} <= waiting:
                    break
                if name in got:
                    got[name] += rows / weight[name]
                assert abs(got[one] - got[other]) <= bound + 1e-6, (one, other, served[start:])


def test_warm_engines_go_first_but_not_before_another_tenants_turn(database: Database) -> None:
    cold = planned_job(database, tenant="a", shards=2, engine_key="cold")
    warm = planned_job(database, tenant="a", shards=2, engine_key="warm")
    found = [nearest(database, ("warm", "more")) for _ in range(3)]
    assert [claim.job.id for claim in found if claim] == [warm.id, warm.id, cold.id]
    planned_job(database, tenant="a", shards=1, engine_key="warm")
    planned_job(database, tenant="b", shards=1, engine_key="cold")
    order(database, 1, ("warm",))
    planned_job(database, tenant="a", shards=1, engine_key="warm")
    assert order(database, 1, ("warm",)) == ["b"]


def test_an_engine_whose_loading_has_not_paid_off_is_kept_at_work_and_the_others_catch_up(database: Database) -> None:
    planned_job(database, tenant="a", shards=6, engine_key="mine")
    planned_job(database, tenant="b", shards=6, engine_key="other")

    def tenants(count: int, sticky_keys: tuple[str, ...]) -> list[str]:
        found = [
            claims.claim(
                database, owner=OWNER, lease_seconds=LEASE, queues=["fake"], warm=("mine",), sticky_keys=sticky_keys
            )
            for _ in range(count)
        ]
        return [claim.job.tenant for claim in found if claim]

    assert tenants(3, sticky_keys=("mine",)) == ["a", "a", "a"]
    assert tenants(3, sticky_keys=()) == ["b", "b", "b"]
    assert sorted(tenants(2, sticky_keys=())) == ["a", "b"]
    urgent = planned_job(database, tenant="b", shards=1, engine_key="other", priority=1)
    claim = claims.claim(database, owner=OWNER, lease_seconds=LEASE, queues=["fake"], sticky_keys=("mine",))
    assert claim is not None and claim.job.id == urgent.id


def test_nobody_is_passed_over_for_a_warm_engine_for_ever(database: Database) -> None:
    cold = planned_job(database, shards=2, engine_key="cold")
    warm = planned_job(database, shards=2, engine_key="warm")
    due_since(database, cold.id, fair_queue.AFFINITY_SECONDS - 100)
    claim = nearest(database, ("warm",))
    assert claim is not None and claim.job.id == warm.id
    due_since(database, cold.id, fair_queue.AFFINITY_SECONDS + 1)
    claim = nearest(database, ("warm",))
    assert claim is not None and claim.job.id == cold.id


def test_the_longest_due_goes_first_and_what_is_not_due_does_not(database: Database) -> None:
    first, second = planned_job(database, shards=1), planned_job(database, shards=1)
    due_since(database, second.id, 50.0)
    waiting = planned_job(database, shards=3, tenant="another", priority=9)
    due_since(database, waiting.id, -3600.0)
    found = [nearest(database) for _ in range(3)]
    assert [claim and claim.job.id for claim in found] == [second.id, first.id, None]


def test_every_queue_is_served_if_none_is_named(database: Database) -> None:
    planned_job(database, shards=1, queue="onnx")
    planned_job(database, shards=1, queue="vllm", priority=1)
    planned_job(database, shards=1, queue="fake", priority=2)
    found = [claims.claim(database, owner=OWNER, lease_seconds=LEASE, queues=q) for q in (["vllm", "onnx"], None, None)]
    assert [claim and claim.job.queue for claim in found] == ["vllm", "fake", "onnx"]
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE, queues=[]) is None


def test_a_lane_whose_job_is_being_wound_down_does_not_hold_up_the_next(database: Database) -> None:
    stopping = planned_job(database, shards=3, priority=5)
    with database.write() as connection:  # as between the request and its batches
        connection.execute(
            tables.job.update().where(tables.job.c.id == stopping.id).values(state=JobState.CANCELLING, stop_reason="x")
        )
    other = planned_job(database, shards=1)
    claim = nearest(database)
    assert claim is not None and claim.job.id == other.id


def test_a_cap_counts_what_runs_and_lets_others_pass(database: Database) -> None:
    tenants.add(database, "capped", max_running=2)
    capped = planned_job(database, tenant="capped", shards=5, priority=3)
    planned_job(database, tenant="other", shards=1)
    held = [claim for claim in (nearest(database) for _ in range(4)) if claim is not None]
    assert [claim.job.tenant for claim in held] == ["capped", "capped", "other"]
    # A worker that serves one job only is held to it as well.
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE, job_id=capped.id) is None
    attempts.commit(database, held[0], output(held[0]), stats={})
    assert nearest(database) is not None
    assert nearest(database) is None
    expire_lease(database, held[1])
    assert reaper.reap(database, lease_seconds=0.0, max_losses=8, actor="reaper").ready == 1
    assert claims.claim(database, owner=OWNER, lease_seconds=LEASE, job_id=capped.id) is not None


def run_threads(count: int, work: Callable[[int], None]) -> None:
    start = threading.Barrier(count)
    failures: list[BaseException] = []

    def body(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_sixteen_claimers_claim_and_commit_every_shard_once(database: Database) -> None:
    """Four tenants, two of them capped, at three priorities; a deadlock would be raised by the database."""
    tenants.add(database, "t0", max_running=3)
    tenants.add(database, "t1", max_running=1, weight=2.0)
    made = [planned_job(database, tenant=f"t{n % 4}", shards=6, priority=n % 3) for n in range(8)]
    done: list[str] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        while any(jobs.get(database, job.id).n_open for job in made):
            claim = nearest(database, ("key",), owner=f"w{number}")
            if claim is not None:
                attempts.commit(database, claim, output(claim), stats={})
                with lock:
                    done.append(claim.shard.id)

    run_threads(16, work)
    assert len(done) == len(set(done)) == 48
    assert {jobs.get(database, job.id).state for job in made} == {JobState.FINALIZING}


def test_a_cap_holds_however_many_claim_at_once(database: Database) -> None:
    tenants.add(database, "capped", max_running=5)
    job = planned_job(database, tenant="capped", shards=40)
    found: list[Claim | None] = []

    def work(number: int) -> None:
        for _ in range(2):
            found.append(nearest(database, owner=f"w{number}"))
            found.append(claims.claim(database, owner=f"w{number}", lease_seconds=LEASE, job_id=job.id))

    run_threads(16, work)
    assert sum(claim is not None for claim in found) == 5
    assert sum(row.state == "running" for row in stored(database, "shard")) == 5


def _steps(database: Database) -> int:
    """What choosing a shard reads: instructions of SQLite's machine, or rows of ``shard`` on PostgreSQL."""
    query = sa.text("SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'shard'")
    steps: list[int] = []
    with database.write() as connection:
        raw: Any = connection.connection.driver_connection
        if database.sqlite:
            raw.set_progress_handler(lambda: steps.append(1), 1)
        before = 0 if database.sqlite else connection.execute(query).scalar_one()
        assert fair_queue.next_shard(database, connection, queues=["fake"], warm=["key"]) is not None
        if database.sqlite:
            raw.set_progress_handler(None, 0)
            return len(steps)
        return int(connection.execute(query).scalar_one()) - before


@pytest.mark.parametrize("waiting", [False, True])
def test_choosing_reads_no_more_of_a_long_queue_than_of_a_short_one(database: Database, waiting: bool) -> None:
    """``waiting``: nearly all shards are not due yet, and of the best priority."""
    planned_job(database, shards=5, tenant="a")
    planned_job(database, shards=5, tenant="b", engine_key="other")

    def analyzed() -> None:
        with database.write() as connection:
            connection.execute(sa.text("ANALYZE"))

    analyzed()
    short = _steps(database)
    many = planned_job(database, shards=3000, tenant="a", priority=7 if waiting else 0)
    if waiting:
        due_since(database, many.id, -3600.0)
    analyzed()
    assert _steps(database) < 2 * short + 20
