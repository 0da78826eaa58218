"""Text with a NUL or half of a surrogate pair goes through a whole job, with the same result on every database."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.base import ResultBatch, RowFailure
from pipeline.engines.fake.engine import FakeEngine
from storage.errors import InvalidModel
from storage.states import JobState

BAD = "a\0b\udc80c"
GOOD = r"a\x00b\udc80c"
NAME = "te\0xt"


@pytest.fixture
def client(settings: Settings, database_url: str) -> Iterator[Client]:
    with Client(settings=settings.model_copy(update={"database_url": database_url})) as client:
        yield client


def fields(tmp_path: Path, **more: Any) -> dict[str, Any]:
    pq.write_table(pa.table({"id": [0, 1], NAME: ["x", "y\0"]}), tmp_path / "in.parquet")
    base = {"input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out"), "model": "fake", "task": "generate"}
    return base | {"prompt": f"{{{NAME}}}"} | more


def test_names_and_values_of_columns_stay_as_they_are(client: Client, tmp_path: Path) -> None:
    done = client.run(**fields(tmp_path))
    assert (done.state, done.rows_failed) == (JobState.COMPLETED, 0)
    rows = pq.read_table(tmp_path / "out" / "data")
    assert rows.column(NAME).to_pylist() == ["x", "y\0"]
    assert rows.column("output").to_pylist()[1].endswith("y\0")
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["job"]["state"] == "completed"


def test_what_an_engine_says_of_a_row_is_that_rows_error(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer = FakeEngine.infer

    def failing(*args: Any) -> Iterator[ResultBatch]:
        for batch in infer(*args):
            failures = tuple(RowFailure(int(row), "engine_error", BAD) for row in batch.rows)
            yield dataclasses.replace(batch, rows=batch.rows[:0], values=None, failures=failures)

    monkeypatch.setattr(FakeEngine, "infer", failing)
    done = client.run(**fields(tmp_path))
    assert (done.state, done.rows_failed) == (JobState.COMPLETED, 2)
    errors = pq.read_table(tmp_path / "out" / "data").column("error").to_pylist()
    assert errors == [{"code": "engine_error", "message": GOOD}] * 2
    assert [error.message for error in client.job(done.id).errors()] == [GOOD] * 2


def test_what_an_engine_says_at_its_end_is_the_jobs_error(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(engine: FakeEngine) -> None:
        raise InvalidModel("a\0b")

    monkeypatch.setattr(FakeEngine, "load", failing)
    done = client.run(**fields(tmp_path))
    assert done.state is JobState.FAILED
    assert r"a\x00b" in str(done.error)
