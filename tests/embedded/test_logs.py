"""The log of an embedded job as JSON: whatever is logged inside an attempt says which one, by whichever thread."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation, ResultBatch, RowBatch
from pipeline.engines.fake.engine import FakeEngine
from pipeline.execution import prefetch
from pipeline.execution.flush import Flusher
from pipeline.spec.job_spec import JobSpec
from storage import logs
from storage.errors import Interrupted
from storage.states import JobState

library = logging.getLogger("a.library")


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(stream), root.level
    logs.format_as("json", [handler])
    root.addHandler(handler)
    root.setLevel("INFO")
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def test_every_line_says_what_it_belongs_to(
    settings: Settings, log: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, flush, fill, failed = FakeEngine.infer, Flusher._flush, prefetch._fill, threading.Event()

    def noisy_infer(
        self: FakeEngine, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation
    ) -> Iterator[ResultBatch]:
        library.info("the engine runs")
        if not failed.is_set():
            failed.set()
            raise RuntimeError("once, with password='s3cr3tPW'")
        yield from infer(self, spec, batches, cancel)

    def noisy_flush(self: Flusher, *args: Any) -> Any:
        library.info("a part is written")
        return flush(self, *args)

    def noisy_fill(*args: Any) -> None:
        library.info("the reader reads")
        fill(*args)

    monkeypatch.setattr(FakeEngine, "infer", noisy_infer)
    monkeypatch.setattr(Flusher, "_flush", noisy_flush)
    monkeypatch.setattr(prefetch, "_fill", noisy_fill)
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "in.parquet")
    with Client(settings=settings.model_copy(update={"flush_rows": 1})) as client:
        status = client.run(
            input=str(tmp_path / "in.parquet"),
            output=str(tmp_path / "out"),
            model="fake",
            task="generate",
            prompt="{text}",
        )
    assert status.state is JobState.COMPLETED
    records = [json.loads(line) for line in log.getvalue().splitlines()]
    (crash,) = [record for record in records if record.get("action") == "attempt.failed"]
    ids = {name: crash[name] for name in ("job_id", "shard_id", "shard", "worker", "tenant")}
    assert (crash["job_id"], crash["shard"], crash["attempt"]) == (status.id, 0, 1)
    assert "RuntimeError" in crash["exception"] and "s3cr3tPW" not in log.getvalue()
    inside = [record for record in records if record["logger"] == library.name]
    assert {record["event"] for record in inside} == {"the engine runs", "the reader reads", "a part is written"}
    assert {record["attempt"] for record in inside} == {1, 2}
    assert all(record.items() >= ids.items() for record in inside)


@pytest.mark.parametrize("breaks", [False, True])
def test_a_shard_that_is_handed_back_is_told(
    settings: Settings, log: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    """In an interrupt, whether the engine ends as it should or breaks."""
    interrupt, infer = Cancellation(), FakeEngine.infer

    def interrupted(
        self: FakeEngine, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation
    ) -> Iterator[ResultBatch]:
        interrupt.cancel("interrupted")
        if breaks:
            raise RuntimeError("half of it is gone")
        yield from infer(self, spec, batches, cancel)

    monkeypatch.setattr(FakeEngine, "infer", interrupted)
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "in.parquet")
    where = {"input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out")}
    with Client(settings=settings) as client, pytest.raises(Interrupted):
        client.run(**where, model="fake", task="generate", prompt="{text}", interrupt=interrupt)
    records = [json.loads(line) for line in log.getvalue().splitlines()]
    (released,) = [record for record in records if record.get("action") == "attempt.released"]
    assert (released["shard"], released["attempt"]) == (0, 1)
    assert released["level"] == ("warning" if breaks else "info")
    assert ("half of it is gone" if breaks else "interrupted") in released["event"]
