"""``job.errors()``: every failed row with its reason, in order, in whatever state the job is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client, JobHandle
from pipeline.client.failed_rows import UNKNOWN
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from storage.errors import InvalidJob, NotFound
from storage.states import JobState, RequestState
from tests.faults.driver import wait_until

N = 900
BAD = [row for row in range(N) if row % 3]
"""600 rows: more in each shard than are kept in SQL."""


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    small = settings.model_copy(update={"read_batch_rows": 25, "flush_rows": 50})
    with Client(settings=small) as client:
        yield client


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    texts = [f"document {row % 30} {'bad' if row % 3 else 'good'} {row}" for row in range(N)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    return {
        "input": str(tmp_path / "texts.parquet"),
        "output": str(tmp_path / "out"),
        "model": "fake",
        "task": "generate",
        "prompt": "{text}",
        "shard_rows": 400,
        "engine_options": {"fail_rows_matching": "bad"},
    }


def check(job: JobHandle, rows: list[int]) -> None:
    """All of them, with reasons; counted, sliced, and page by page."""
    errors = job.errors()
    found = list(errors)
    assert [item.row for item in found] == rows
    assert {item.code for item in found} <= {"engine_refused"}
    assert len(errors) == errors.total == len(rows)
    pages, after = [], None
    while page := list(job.errors(limit=70, after=after)):
        pages += page
        after = page[-1].row
        assert len(job.errors(after=after)) == len(rows) - len(pages)
    assert pages == found
    if rows:
        assert errors[0] == found[0]
        assert errors[-1] == found[-1]
        assert errors[5:9] == found[5:9]
        assert list(reversed(errors)) == found[::-1]
        assert found[-1] in errors
        with pytest.raises(IndexError):
            errors[len(rows)]


def interrupted(client: Client, fields: dict[str, Any], until: int) -> JobHandle:
    """Let it run until so many rows are flushed."""
    gate = Path(fields["output"]).parent / "gate"
    options = fields["engine_options"] | {"gate_file": str(gate), "gate_after_rows": until}
    job = client.submit(**fields | {"engine_options": options})
    wait_until(lambda: job.status().rows_done >= until - 100, "rows are flushed")
    return job


def published_errors(fields: dict[str, Any]) -> int:
    table = pa.concat_tables([pq.read_table(file) for file in sorted((Path(fields["output"]) / "data").iterdir())])
    return len(table) - table.column("error").null_count


@pytest.mark.parametrize("order", ["auto", "prefix"])
def test_of_a_finished_job(client: Client, fields: dict[str, Any], order: str) -> None:
    status = client.run(**fields, order=order)
    job = client.job(status.id)
    assert status.rows_failed == len(BAD)
    check(job, BAD)
    last = job.request(BAD[-1])
    assert (last.state, last.code) == (RequestState.FAILED, "engine_refused")
    assert last == client.request(job.id, BAD[-1])
    assert job.request(0).code is None


@pytest.mark.parametrize("order", ["auto", "prefix"])
def test_of_a_job_at_work_and_of_a_cancelled_one(client: Client, fields: dict[str, Any], order: str) -> None:
    job = interrupted(client, fields | {"order": order}, until=600)
    at_work = [item.row for item in job.errors()]
    assert len(at_work) > 250
    assert at_work == sorted(at_work)
    assert len(job.errors()) >= len(at_work), "more may have been flushed meanwhile"
    client._session.stop()
    background = client._session._running[job.id]
    assert background.done.wait(60)
    before = [item.row for item in job.errors()]
    assert set(at_work) <= set(before) <= set(BAD)
    status = job.cancel()
    assert (status.state, status.rows_failed) == (JobState.CANCELLED, len(before))
    assert published_errors(fields) == len(before)
    check(job, before)


def test_of_retried_rows(client: Client, fields: dict[str, Any], tmp_path: Path) -> None:
    """While they are computed once more they have not failed; what fails again is told anew."""
    gate = {"gate_file": str(tmp_path / "gate"), "gate_after_rows": N + len(BAD) + 450}  # closes in the second retry
    fields["engine_options"] |= gate
    job = client.job(client.run(**fields).id)
    job.retry()
    check(job, [])
    job.wait(timeout=60)
    check(job, BAD)
    interrupt = Cancellation()
    job.retry()

    def stop(status: Any) -> None:
        if status.rows_failed >= 100:
            interrupt.cancel("enough")

    with pytest.raises(Exception, match="interrupted"):
        job.resume(interrupt=interrupt, on_progress=stop)
    check(job, [item.row for item in job.errors()])
    assert 100 <= len(job.errors()) < len(BAD)
    job.cancel()
    assert published_errors(fields) == len(job.errors())
    check(job, [item.row for item in job.errors()])


def test_a_job_that_ends_while_its_errors_are_read(client: Client, fields: dict[str, Any], tmp_path: Path) -> None:
    """What it had flushed is deleted then; the rest is read from the output."""
    job = interrupted(client, fields, until=600)
    rows = iter(job.errors())
    first = next(rows)
    (tmp_path / "gate").touch()
    job.wait(timeout=60)
    found = [first, *rows]
    assert [item.row for item in found][:200] == BAD[:200]
    assert UNKNOWN[0] not in {item.code for item in found}


def test_of_a_job_whose_output_was_replaced(client: Client, fields: dict[str, Any]) -> None:
    """As many as there were; their reasons, as far as they are kept."""
    job = client.job(client.run(**fields).id)
    client.run(**fields | {"engine_options": {}, "overwrite": True})
    found = list(job.errors())
    assert [item.row for item in found] == BAD
    assert [item.code for item in found].count("engine_refused") == 100 + 100 + 67, "of three shards"
    assert {item.code for item in found} == {"engine_refused", UNKNOWN[0]}


def test_a_limit_is_checked(client: Client, fields: dict[str, Any]) -> None:
    job = client.job(client.run(**fields).id)
    assert len(job.errors(limit=5)) == 5
    with pytest.raises(InvalidJob, match="limit"):
        job.errors(limit=0)
    with pytest.raises(InvalidJob, match="after"):
        job.errors(after="x")  # type: ignore[arg-type]
    for row in (-1, N, 2**62):
        with pytest.raises(NotFound):
            job.request(row)
    assert json.loads((Path(fields["output"]) / "_manifest.json").read_text())["rows"]["failed"] == len(job.errors())
