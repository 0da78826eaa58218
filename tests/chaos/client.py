"""The users of a chaos run: they submit, cancel and retry, whatever is down, and remember what they asked for.

What a fault has failed (a disk that was full for too long) they retry as well: no job may need more than that.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import Client, JobSpec
from pipeline.config.settings import Settings
from pipeline.jobs.preflight import absolute
from storage.errors import CommitUnknown, Conflict, IllegalTransition, TransientError
from storage.states import TERMINAL_JOB, FireState, JobState
from tests.chaos.schedule import PlannedJob, PlannedTimetable, Schedule


@dataclass
class Asked:
    """One job, and how far its user has come with it. ``like`` names what jobs of the same rows have in common."""

    planned: PlannedJob
    fields: dict[str, Any]
    output: Path
    like: str
    id: str | None = None
    submitted_at: float = 0.0
    to_cancel: bool = False
    to_retry: bool = False
    state: JobState | None = None

    @property
    def over(self) -> bool:
        """Nothing is left to ask for, and the job has ended."""
        ended = self.state in TERMINAL_JOB and self.state is not JobState.FAILED
        return ended and not self.to_cancel and not self.to_retry


class Users(threading.Thread):
    """``asked`` are all jobs of the schedule, those still to be submitted too. ``error`` is what ended the thread."""

    def __init__(self, home: Path, settings: Settings, schedule: Schedule, began: float) -> None:
        super().__init__(name="users", daemon=True)
        self.counts: Counter[str] = Counter()
        self.error: BaseException | None = None
        self.asked = [_asked(home, number, job) for number, job in enumerate(schedule.jobs)]
        self.timetables = [Timetable(home, number, planned) for number, planned in enumerate(schedule.timetables)]
        self._settings, self._began = settings, began
        self._calm, self._over = threading.Event(), threading.Event()

    @property
    def over(self) -> bool:
        """Every job has ended, those of the schedules too."""
        return all(job.over for job in self.asked) and all(timetable.over for timetable in self.timetables)

    def calm(self) -> None:
        """No more faults: schedules come to an end, too."""
        self._calm.set()

    def run(self) -> None:
        try:
            with Client(settings=self._settings) as client:
                while not self._over.wait(0.1):
                    for job in self.asked:
                        try:
                            self._serve(client, job)
                        except (TransientError, CommitUnknown):
                            self.counts["calls that met a fault"] += 1  # asked again in the next round
                    for timetable in self.timetables:
                        try:
                            timetable.serve(client, self._calm.is_set())
                        except (TransientError, CommitUnknown):
                            self.counts["calls that met a fault"] += 1
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _serve(self, client: Client, job: Asked) -> None:
        if job.over or time.monotonic() < self._began + job.planned.at:
            return
        if job.id is None:
            # A call whose answer was lost is safe to repeat under the same key.
            job.id = client.submit(**job.fields).id
            job.submitted_at = time.monotonic()
            self.counts["jobs"] += 1
        handle = client.job(job.id)
        job.state = handle.status().state
        if job.to_cancel and time.monotonic() >= job.submitted_at + (job.planned.cancel_after or 0.0):
            try:
                handle.cancel()
                self.counts["cancels"] += 1
            except IllegalTransition:
                self.counts["cancels that came too late"] += 1
            job.to_cancel = False
            job.state = None
        elif job.to_retry and not job.to_cancel and job.state in TERMINAL_JOB:
            try:
                handle.retry(failed_only=job.planned.retry == "failed")
                self.counts["retries"] += 1
            except Conflict:
                self.counts["retries with nothing to do"] += 1
            job.to_retry = False
            job.state = None
        elif job.state is JobState.FAILED:
            handle.retry()
            self.counts["jobs retried after a fault"] += 1
            job.state = None


class Timetable:
    """A schedule of Rowmill's, from its making to its pause. ``asked`` are the jobs that its fires have become."""

    def __init__(self, home: Path, number: int, planned: PlannedTimetable) -> None:
        self.name = f"timetable-{number}"
        self.asked: dict[str, Asked] = {}
        self.over = False
        self._planned = planned
        self._fields = job_fields(home, self.name, planned.fields)
        self._fields["output"] += "-{fire_date:%Y%m%d-%H%M}"
        self._added = self._paused = False

    def serve(self, client: Client, calm: bool) -> None:
        """Make it; after the faults pause it, once no fire waits, and see its jobs to their end."""
        if not self._added:
            with suppress(Conflict):  # of an earlier call, whose answer was lost
                client.schedules.add(self.name, cron=self._planned.cron, job=self._fields, **self._planned.options)
            self._added = True
        if not calm or self.over:
            return
        # A paused schedule submits no fire that waits.
        waits = any(fire.state is FireState.PENDING for fire in client.schedules.fires(self.name, limit=100_000))
        if waits is self._paused:
            (client.schedules.resume if waits else client.schedules.pause)(self.name)
            self._paused = not waits
        if self._paused:
            self.over = self._see_to_jobs(client)

    def _see_to_jobs(self, client: Client) -> bool:
        for fire in client.schedules.fires(self.name, limit=100_000):
            if fire.state is FireState.PENDING:
                return False
            if fire.job_id is None:
                continue
            handle = client.job(fire.job_id)
            status = handle.status()
            if status.state is JobState.FAILED:
                handle.retry()
            if status.state is JobState.FAILED or status.state not in TERMINAL_JOB:
                return False
            fields = self._fields | {"output": status.output}
            planned = PlannedJob(0.0, fields)
            self.asked[status.id] = Asked(
                planned, fields, Path(status.output), self.name, id=status.id, state=status.state
            )
        return True


def _asked(home: Path, number: int, planned: PlannedJob) -> Asked:
    fields = job_fields(home, f"{number}", planned.fields) | {"idempotency_key": f"job-{number}"}
    spec = absolute(JobSpec(**fields))
    return Asked(
        planned,
        fields,
        Path(spec.output),
        like=f"{number}",
        to_cancel=planned.cancel_after is not None,
        to_retry=bool(planned.retry),
    )


def job_fields(home: Path, name: str, planned: Mapping[str, Any]) -> dict[str, Any]:
    """What to submit, with its input written: ``home/in``, ``home/out`` and the file of computed rows go by name."""
    fields = dict(planned)
    source, output = home / "in" / f"{name}.{fields.pop('format')}", home / "out" / name
    _write_input(source, fields.pop("n_rows"))
    shape = {"prompt": "Say: {text}"} if fields["task"] == "generate" else {"column": "text"}
    fields["engine_options"] = dict(fields["engine_options"]) | {"rows_file": str(home / f"computed-{name}")}
    return fields | {"input": str(source), "output": str(output), "model": "fake"} | shape


def _write_input(path: Path, n_rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [None if row % 211 == 5 else f"row {row} of {n_rows}: {row * 7919 % 10007}" for row in range(n_rows)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": row, "text": text}) + "\n" for row, text in enumerate(texts)))
        return
    pq.write_table(pa.table({"id": pa.array(range(n_rows), pa.int64()), "text": texts}), path, row_group_size=300)
