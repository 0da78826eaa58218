"""The users of a chaos run: they submit, cancel and retry, whatever is down, and remember what they asked for."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import Client, JobSpec
from pipeline.config.settings import Settings
from pipeline.jobs.preflight import absolute
from storage.errors import CommitUnknown, Conflict, IllegalTransition, TransientError
from storage.states import TERMINAL_JOB, JobState
from tests.chaos.schedule import PlannedJob


@dataclass
class Asked:
    """One job of the schedule, and how far its user has come with it."""

    planned: PlannedJob
    fields: dict[str, Any]
    output: Path
    id: str | None = None
    submitted_at: float = 0.0
    to_cancel: bool = False
    to_retry: bool = False
    state: JobState | None = None

    @property
    def over(self) -> bool:
        """Nothing is left to ask for, and the job has ended."""
        return self.state in TERMINAL_JOB and not self.to_cancel and not self.to_retry


class Users(threading.Thread):
    """``asked`` are all jobs of the schedule, those still to be submitted too. ``error`` is what ended the thread."""

    def __init__(self, home: Path, settings: Settings, planned: list[PlannedJob], began: float) -> None:
        super().__init__(name="users", daemon=True)
        self.counts: Counter[str] = Counter()
        self.error: BaseException | None = None
        self.asked = [_asked(home, number, job) for number, job in enumerate(planned)]
        self._settings, self._began = settings, began
        self._over = threading.Event()

    def run(self) -> None:
        try:
            with Client(settings=self._settings) as client:
                while not self._over.wait(0.1):
                    for job in self.asked:
                        try:
                            self._serve(client, job)
                        except (TransientError, CommitUnknown):
                            self.counts["calls that met a fault"] += 1  # asked again in the next round
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


def _asked(home: Path, number: int, planned: PlannedJob) -> Asked:
    fields = dict(planned.fields)
    source, output = home / "in" / f"{number}.{fields.pop('format')}", home / "out" / f"{number}"
    _write_input(source, fields.pop("n_rows"))
    shape = {"prompt": "Say: {text}"} if fields["task"] == "generate" else {"column": "text"}
    fields["engine_options"] = dict(fields["engine_options"]) | {"rows_file": str(home / f"computed-{number}")}
    key = {"idempotency_key": f"job-{number}"}
    fields |= {"input": str(source), "output": str(output), "model": "fake"} | shape | key
    spec = absolute(JobSpec(**fields))
    return Asked(
        planned, fields, Path(spec.output), to_cancel=planned.cancel_after is not None, to_retry=bool(planned.retry)
    )


def _write_input(path: Path, n_rows: int) -> None:
    path.parent.mkdir(exist_ok=True)
    texts = [None if row % 211 == 5 else f"row {row} of {n_rows}: {row * 7919 % 10007}" for row in range(n_rows)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": row, "text": text}) + "\n" for row, text in enumerate(texts)))
        return
    pq.write_table(pa.table({"id": pa.array(range(n_rows), pa.int64()), "text": texts}), path, row_group_size=300)
