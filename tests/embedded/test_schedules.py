"""Schedules from end to end on both databases: what a fire does, what it leaves alone, and what it says about it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.process.runtime import Runtime
from pipeline.schedules import fire as schedule_firing
from pipeline.worker import embedded, maintenance
from pipeline.worker.beat import beat_and_run
from pipeline.worker.worker import Worker
from storage.errors import Conflict, InvalidJob, NotFound, Unreachable
from storage.fleet import job_lookup
from storage.queue import jobs, schedules
from storage.queue.schedules import DueFire
from storage.records import Fire, Job
from storage.sql import tables
from storage.states import FireState, JobState
from storage.tenants import tenants

DAY = 86400.0
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
FAR = NOON + 10_000 * DAY


class House:
    """A client with a folder of input, and schedules that come due when a test says so."""

    def __init__(self, client: Client, home: Path) -> None:
        self.client, self.home = client, home
        self.runtime: Runtime = client._runtime
        (home / "in").mkdir()

    def write(self, name: str, *texts: str) -> Path:
        path = self.home / "in" / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            pq.write_table(pa.table({"text": list(texts)}), path)
        return path

    def add(self, name: str = "daily", *, job: dict[str, Any] | None = None, **options: Any) -> None:
        base = {
            "input": str(self.home / "in"),
            "output": str(self.home / "out" / "{schedule}-{fire_date:%Y-%m-%dT%H%M}"),
            "model": "fake",
            "task": "generate",
            "prompt": "{text}",
        }
        self.client.schedules.add(name, **{"cron": "0 12 * * *", "job": base | (job or {})} | options)
        self._next(name, FAR)

    def _next(self, name: str, at: float) -> None:
        with self.runtime.database.write() as connection:
            schedule = tables.schedule
            connection.execute(schedule.update().where(schedule.c.name == name).values(next_at=at))

    def downtime(self, name: str, since: float) -> None:
        """As if nobody had looked since ``since``."""
        self._next(name, since)

    def come_due(self, day: int, name: str = "daily") -> Fire:
        """The schedule comes due at noon of a day of March 2026, and one tick sees to it."""
        found = self.client.schedules.get(name)
        at = NOON + (day - 1) * DAY
        assert schedules.advance(self.runtime.database, found, [DueFire(at)], FAR)
        self.tick()
        return self.fire(day, name)

    def tick(self) -> list[str]:
        return maintenance.run_maintenance(self.runtime)

    def fire(self, day: int, name: str = "daily") -> Fire:
        (found,) = [f for f in self.client.schedules.fires(name) if f.fire_at == NOON + (day - 1) * DAY]
        return found

    def states(self, name: str = "daily") -> list[str]:
        """Of its fires, the oldest first."""
        return [str(fire.state) for fire in reversed(self.client.schedules.fires(name))]

    def job_of(self, fire: Fire) -> Job:
        assert fire.job_id is not None, fire
        return jobs.get(self.runtime.database, fire.job_id)

    def run(self, fire: Fire) -> list[str]:
        """Run the fire's job to its end; the texts of its output."""
        status = embedded.run_job(self.runtime, self.job_of(fire), interrupt=Cancellation())
        assert status.state is JobState.COMPLETED, status
        return pq.read_table(f"{status.output}/data").column("text").to_pylist()  # type: ignore[no-any-return]


@pytest.fixture
def house(settings: Settings, database_url: str, tmp_path: Path) -> Iterator[House]:
    with Client(
        settings=settings.model_copy(update={"database_url": database_url, "max_failures": 1, "tick_seconds": 0.05})
    ) as client:
        yield House(client, tmp_path)


def test_a_time_that_has_come_fires_once(house: House) -> None:
    house.write("a.parquet", "a")
    house.add(cron="*/5 * * * *", tz="Asia/Kolkata")
    clock = house.runtime.database.clock()
    due = clock - clock % 300
    house.downtime("daily", due)
    assert len(house.tick()) == 1
    assert house.tick() == []
    (fire,) = house.client.schedules.fires("daily")
    assert (fire.fire_at, fire.state, fire.missed) == (due, FireState.SUBMITTED, 0)
    job = house.job_of(fire)
    assert job.state is JobState.VALIDATING
    assert house.run(fire) == ["a"]
    shown = datetime.fromtimestamp(due + 5.5 * 3600, UTC)
    assert job.output_uri == str(house.home / "out" / f"daily-{shown:%Y-%m-%dT%H%M}")
    assert job.spec["metadata"] == {"schedule": "daily", "fire_at": f"{shown:%Y-%m-%dT%H:%M:%S}+05:30"}
    assert house.client.schedules.get("daily").next_at == due + 300


def test_the_clock_was_set_back_after_the_next_time_was_found(house: House) -> None:
    """Ten thousand days: nobody waits that long, and what has fired does not fire again."""
    house.write("a.parquet", "a")
    house.add()
    assert house.client.schedules.get("daily").next_at == FAR
    assert house.tick() == []
    clock, found = house.runtime.database.clock(), house.client.schedules.get("daily").next_at
    assert clock < found <= clock + DAY


def test_a_tick_that_is_late_does_nothing(house: House) -> None:
    """It read the schedule, and the pending fire, before another tick saw to them; even their job has ended since."""
    house.write("a.parquet", "a")
    house.add(job={"overwrite": True})
    house.downtime("daily", NOON)
    stale = house.client.schedules.get("daily")
    fire = house.come_due(1)
    before = house.client.schedules.get("daily")
    assert not schedules.advance(house.runtime.database, stale, [DueFire(NOON + 5 * DAY)], NOON + 6 * DAY)
    assert house.client.schedules.get("daily") == before
    house.run(fire)
    pending = replace(fire, state=FireState.PENDING, job_id=None, job_state=None)
    assert schedule_firing._submit(house.runtime, stale, pending) is None
    assert [job.id for job in job_lookup.listed(house.runtime.database)] == [fire.job_id]
    assert house.client.schedules.fires("daily") == [house.fire(1)]
    assert house.fire(1).job_id == fire.job_id


def test_after_a_downtime_the_latest_is_run(house: House) -> None:
    house.write("a.parquet", "a")
    house.add()
    house.downtime("daily", NOON)
    house.tick()
    (fire,) = house.client.schedules.fires("daily")
    clock = house.runtime.database.clock()
    assert fire.state is FireState.SUBMITTED
    assert clock - fire.fire_at < DAY
    assert fire.missed == round((fire.fire_at - NOON) / DAY)


def test_a_fire_that_is_noticed_too_late_is_skipped(house: House) -> None:
    house.add(cron="0 12 1 1 *", misfire_grace="1h")
    house.downtime("daily", datetime(2025, 1, 1, 12, tzinfo=UTC).timestamp())
    assert house.tick() == []
    (fire,) = house.client.schedules.fires("daily")
    assert (fire.state, fire.missed) == (FireState.SKIPPED, datetime.now(UTC).year - 2025)
    assert "misfire_grace is 3,600 s" in str(fire.reason)


def test_all_that_was_missed_is_made_up_for_in_order(house: House) -> None:
    house.write("a.parquet", "a")
    house.add(cron="0 12 1 1 *", misfire="all", overlap="queue")
    house.downtime("daily", datetime(2024, 1, 1, 12, tzinfo=UTC).timestamp())
    count = datetime.now(UTC).year - 2024 + 1
    house.tick()
    for done in range(count):
        assert house.states() == ["submitted"] * (done + 1) + ["pending"] * (count - done - 1)
        fire = list(reversed(house.client.schedules.fires("daily")))[done]
        assert house.run(fire) == ["a"]
        assert f"daily-{2024 + done}-01-01" in house.job_of(fire).output_uri
        house.tick()


def test_only_so_many_fires_wait(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.write("a.parquet", "a")
    house.add(cron="0 * * * *", misfire="all", overlap="queue")
    monkeypatch.setattr(schedule_firing, "MOST_WAITING", 3)
    house.downtime("daily", NOON)
    house.tick()
    assert house.states() == ["submitted", "pending", "pending"]
    assert house.client.schedules.fires("daily")[-1].missed > 700


def test_a_queue_that_is_full_takes_no_more(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.write("a.parquet", "a")
    house.add(overlap="queue")
    monkeypatch.setattr(schedule_firing, "MOST_WAITING", 2)
    for day in (1, 2, 3):
        house.come_due(day)
    house.downtime("daily", NOON + 4 * DAY)
    house.tick()
    newest = house.client.schedules.fires("daily")[0]
    assert newest.state is FireState.SKIPPED
    assert newest.reason == "2 earlier fires still wait for their job"
    assert house.states()[:3] == ["submitted", "pending", "pending"]


def test_a_time_that_comes_again_does_not_fire_again(house: House) -> None:
    """The database's clock was put back, and the schedule with it."""
    house.write("a.parquet", "a")
    house.add(cron="0 12 1 1 *")
    new_year = datetime(datetime.now(UTC).year, 1, 1, 12, tzinfo=UTC).timestamp()
    for _ in range(2):
        house.downtime("daily", new_year)
        house.tick()
    assert house.states() == ["submitted"]


def test_overlap_skip(house: House) -> None:
    house.write("a.parquet", "a")
    house.add()
    first = house.come_due(1)
    second = house.come_due(2)
    assert second.state is FireState.SKIPPED
    assert f"job {first.job_id} (validating)" in str(second.reason)
    assert "2026-03-01 12:00:00+00:00" in str(second.reason)
    house.run(first)
    assert house.come_due(3).state is FireState.SUBMITTED
    assert house.states() == ["submitted", "skipped", "submitted"]


def test_overlap_queue(house: House) -> None:
    house.write("a.parquet", "a")
    house.add(overlap="queue")
    first = house.come_due(1)
    second = house.come_due(2)
    assert second.state is FireState.PENDING
    assert f"waits: the fire of 2026-03-01 12:00:00+00:00 has not ended: job {first.job_id}" in str(second.reason)
    assert house.tick() == []
    house.run(first)
    assert house.tick() == [house.fire(2).job_id]
    assert house.fire(2).reason is None
    assert house.run(house.fire(2)) == ["a"]


def test_overlap_cancel_previous(house: House) -> None:
    """The new job begins when the old one has been wound down, which may take a worker's time."""
    house.write("a.parquet", "a")
    house.add(overlap="cancel-previous")
    first = house.come_due(1)
    job = house.client.job(str(first.job_id))
    second = house.come_due(2)
    assert job.status().state is JobState.CANCELLING
    assert second.state is FireState.PENDING
    third = house.come_due(3)
    assert (house.fire(2).state, third.state) == (FireState.SKIPPED, FireState.PENDING)
    assert "replaced by the fire of 2026-03-03" in str(house.fire(2).reason)
    assert embedded.run_job(house.runtime, house.job_of(first), interrupt=Cancellation()).state is JobState.CANCELLED
    assert house.tick() == [house.fire(3).job_id]
    assert house.run(house.fire(3)) == ["a"]


def test_cancel_previous_waits_for_a_job_that_is_only_being_published(house: House) -> None:
    house.write("a.parquet", "a")
    house.add(overlap="cancel-previous")
    first = house.come_due(1)
    worker = Worker(house.runtime.settings)
    try:
        worker.plan()
        worker.run("fake")
        assert house.job_of(first).state is JobState.FINALIZING
        assert house.come_due(2).state is FireState.PENDING
        assert house.job_of(first).state is JobState.FINALIZING
        worker.finalize()
    finally:
        worker.close()
    assert house.job_of(first).state is JobState.COMPLETED
    assert house.tick() == [house.fire(2).job_id]


def test_incremental_takes_what_no_completed_fire_has_taken(house: House) -> None:
    house.write("a.parquet", "a")
    house.write("b.parquet", "b")
    house.add(incremental=True)
    assert house.run(house.come_due(1)) == ["a", "b"]
    nothing = house.come_due(2)
    assert (nothing.state, nothing.job_id) == (FireState.EMPTY, None)
    assert "no file is new" in str(nothing.reason)
    house.write("b.parquet", "b changed")
    house.write("c.parquet", "c")
    assert house.run(house.come_due(3)) == ["b changed", "c"]
    assert house.come_due(4).state is FireState.EMPTY


def test_incremental_fixes_its_files_when_it_is_planned(house: House) -> None:
    """What lands between the fire and its plan is taken; what lands later is the next fire's."""
    house.write("a.parquet", "a")
    house.add(incremental=True)
    first = house.come_due(1)
    house.write("b.parquet", "b")
    embedded.plan_job(house.runtime, house.job_of(first))
    house.write("c.parquet", "c")
    assert house.run(first) == ["a", "b"]
    assert house.run(house.come_due(2)) == ["c"]


def test_incremental_keeps_partition_columns_and_reads_other_formats(house: House) -> None:
    house.write("day=1/a.jsonl", "a")
    house.write("day=2/b.jsonl", "b")
    house.add(incremental=True)
    assert house.run(house.come_due(1)) == ["a", "b"]
    assert house.come_due(2).state is FireState.EMPTY
    house.write("day=3/c.jsonl", "c")
    third = house.come_due(3)
    assert house.run(third) == ["c"]
    table = pq.read_table(f"{house.job_of(third).output_uri}/data", partitioning=None)
    assert table.column("day").to_pylist() == [3]


@pytest.mark.parametrize("how", ["failed", "cancelled", "refused"])
def test_incremental_takes_the_files_of_a_job_that_did_not_complete_again(house: House, how: str) -> None:
    house.write("a.parquet", "a")
    broken = house.write("b.parquet", "b")
    house.add(incremental=True, job={"engine_options": {"transient_on": "a", "transient_times": 99}})
    first = house.come_due(1)
    if how == "refused":
        broken.write_bytes(b"not Parquet")
        with pytest.raises(InvalidJob):
            embedded.plan_job(house.runtime, house.job_of(first))
        house.write("b.parquet", "b")
    elif how == "cancelled":
        embedded.plan_job(house.runtime, house.job_of(first))
        assert house.client.job(str(first.job_id)).cancel().state is JobState.CANCELLED
    else:
        status = embedded.run_job(house.runtime, house.job_of(first), interrupt=Cancellation())
        assert status.state is JobState.FAILED
    second = house.come_due(2)
    assert embedded.plan_job(house.runtime, house.job_of(second)).rows_total == 2


def test_incremental_leaves_what_was_published_once_to_its_retry(house: House) -> None:
    """A retry of a completed job computes its own rows again; no other fire does, while it waits or when it ends."""
    house.write("a.parquet", "a")
    house.add(incremental=True, overlap="queue")
    first = house.come_due(1)
    assert house.run(first) == ["a"]
    taken = schedules.processed(house.runtime.database, first.schedule_id, [str(house.home / "in" / "a.parquet")])
    job = house.client.job(str(first.job_id))
    job.retry(failed_only=False)
    assert job.status().state is JobState.QUEUED
    second = house.come_due(2)
    assert second.state is FireState.PENDING  # it waits for the retry
    uris = [uri for uri, _ in taken]
    assert taken and schedules.processed(house.runtime.database, first.schedule_id, uris) == taken
    assert job.cancel().state is JobState.CANCELLED
    house.tick()
    assert house.fire(2).state is FireState.EMPTY


def test_incremental_does_not_take_what_is_no_data_for_new(house: House) -> None:
    house.write("a.parquet", "a")
    (house.home / "in" / "readme.txt").write_text("what this folder is")
    house.add(incremental=True)
    assert house.run(house.come_due(1)) == ["a"]
    assert house.come_due(2).state is FireState.EMPTY


def test_incremental_counts_a_completed_job_with_failed_rows_as_done(house: House) -> None:
    pq.write_table(pa.table({"text": ["fine", None]}), house.home / "in" / "a.parquet")
    house.add(incremental=True)
    first = house.come_due(1)
    assert house.run(first) == ["fine", None]
    assert house.job_of(first).rows_failed == 1
    assert house.come_due(2).state is FireState.EMPTY


def test_a_quota_that_is_used_up_is_recorded_and_stops_nobody(house: House) -> None:
    house.write("a.parquet", "a")
    database = house.runtime.database
    tenants.add(database, "small", max_jobs=0)
    house.add("unlucky", job={"tenant": "small"})
    house.add("lucky")
    for name, tenant in (("unlucky", "small"), ("lucky", "default")):
        found = house.client.schedules.get(name, tenant)
        assert schedules.advance(database, found, [DueFire(NOON)], FAR)
    house.tick()
    (unlucky,) = house.client.schedules.fires("unlucky", "small")
    assert (unlucky.state, unlucky.job_id) == (FireState.FAILED, None)
    assert "tenant 'small' has 0 live jobs of the 0 it may" in str(unlucky.reason)
    assert house.fire(1, "lucky").state is FireState.SUBMITTED
    assert len(job_lookup.listed(database)) == 1


def test_an_output_that_is_taken_is_recorded(house: House) -> None:
    house.write("a.parquet", "a")
    house.add()
    house.run(house.come_due(1))
    house.client.schedules.remove("daily")
    house.add()
    again = house.come_due(1)
    assert again.state is FireState.FAILED
    assert "already holds published rows" in str(again.reason)


def test_a_defect_is_recorded_and_stops_nobody(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.add()
    monkeypatch.setattr(schedule_firing, "submit_job", lambda *_, **__: 1 / 0)
    assert house.come_due(1).state is FireState.FAILED
    assert house.fire(1).reason == "unexpected ZeroDivisionError: division by zero"


def test_what_may_pass_is_tried_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.write("a.parquet", "a")
    house.add()

    def unreachable(*_: Any, **__: Any) -> Job:
        raise Unreachable("the object store does not answer")

    with monkeypatch.context() as patched:
        patched.setattr(schedule_firing, "submit_job", unreachable)
        fire = house.come_due(1)
        assert (fire.state, fire.reason) == (
            FireState.PENDING,
            "the next tick tries again: the object store does not answer",
        )
    assert house.tick() == [house.fire(1).job_id]


def test_paused_nothing_comes_due_and_nothing_is_made_up_for(house: House) -> None:
    house.write("a.parquet", "a")
    house.add(overlap="queue")
    first = house.come_due(1)
    house.come_due(2)
    house.downtime("daily", NOON + 5 * DAY)
    assert house.client.schedules.pause("daily").paused
    house.run(first)
    assert house.tick() == []
    assert house.states() == ["submitted", "pending"]
    resumed = house.client.schedules.resume("daily")
    assert not resumed.paused
    assert resumed.next_at > house.runtime.database.clock()
    assert house.tick() == [house.fire(2).job_id]
    assert house.states() == ["submitted", "submitted"]


def test_remove_leaves_the_jobs(house: House) -> None:
    house.write("a.parquet", "a")
    house.add()
    fire = house.come_due(1)
    house.client.schedules.remove("daily")
    with pytest.raises(NotFound, match="there is no schedule 'daily'"):
        house.client.schedules.remove("daily")
    assert house.run(fire) == ["a"]


def test_an_incremental_one_is_not_removed_while_a_job_of_it_is_unplanned(house: House) -> None:
    house.write("a.parquet", "a")
    house.add(incremental=True)
    fire = house.come_due(1)
    with pytest.raises(Conflict, match="not planned yet"):
        house.client.schedules.remove("daily")
    house.run(fire)
    house.client.schedules.remove("daily")


def test_names_are_taken_once_for_each_tenant(house: House) -> None:
    house.add()
    with pytest.raises(Conflict, match="there is a schedule 'daily' already"):
        house.add()
    house.client.schedules.add(
        "daily",
        cron="0 1 * * *",
        job={**house.client.schedules.get("daily").spec, "idempotency_key": None, "tenant": "other"},
    )
    assert [(s.name, s.tenant) for s in house.client.schedules.list()] == [("daily", "default"), ("daily", "other")]
    assert [s.tenant for s in house.client.schedules.list("other")] == ["other"]


@pytest.mark.parametrize(
    ("job", "field"),
    [({"model": "no-such-model"}, "model"), ({"engine": "warp"}, "engine"), ({"input": "{schedule}/.."}, "input")],
)
def test_what_cannot_run_is_refused_before_it_is_stored(house: House, job: dict[str, Any], field: str) -> None:
    if field == "input":
        job = {"input": str(house.home)}
    with pytest.raises(InvalidJob) as refused:
        house.add(job=job)
    assert refused.value.field == field
    assert house.client.schedules.list() == []


def test_a_zone_that_is_gone_stops_nobody(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """The time zone data of one machine may be older than those of another."""
    house.write("a.parquet", "a")
    house.add("here")
    house.add("nowhere")
    with house.runtime.database.write() as connection:
        schedule = tables.schedule
        connection.execute(schedule.update().where(schedule.c.name == "nowhere").values(tz="Nowhere/Land"))
    for name in ("here", "nowhere"):
        house.downtime(name, NOON)
    assert len(house.tick()) == 1
    assert house.states("nowhere") == []
    assert "schedule nowhere cannot fire: 'Nowhere/Land' is not a time zone" in caplog.text


def test_a_job_in_the_foreground_fires_nothing(house: House) -> None:
    """Whoever fires a schedule sees to it that its job is run, which ``rowmill run`` does not."""
    house.write("a.parquet", "a")
    house.add()
    house.downtime("daily", NOON)
    maintenance.run_maintenance(house.runtime, schedules=False)
    assert house.client.schedules.fires("daily") == []


def test_beat_without_a_broker_runs_what_it_fires(house: House) -> None:
    """And first what an earlier beat left behind, planned and not run."""
    house.write("a.parquet", "a")
    house.add("left")
    embedded.plan_job(house.runtime, house.job_of(house.come_due(1, "left")))
    house.add(cron="0 12 1 1 *", misfire="all", overlap="queue")
    house.downtime("daily", datetime(2025, 1, 1, 12, tzinfo=UTC).timestamp())
    interrupt, ended = Cancellation(), threading.Event()
    told: list[str] = []
    count = datetime.now(UTC).year - 2025 + 1

    def notify(message: str) -> None:
        told.append(message)
        if len(told) == count + 1:
            ended.set()

    house.client._session.notify(notify)
    beat = threading.Thread(target=beat_and_run, args=(house.runtime, interrupt))
    beat.start()
    try:
        assert ended.wait(60), told
    finally:
        interrupt.cancel("the test is over")
        beat.join(60)
    assert all("completed: 1 rows" in message for message in told)
    assert house.states() == ["submitted"] * count
    assert house.job_of(house.fire(1, "left")).state is JobState.COMPLETED
