"""``limit`` and ``sample``: some rows of the input as a job of its own; and ``request_timeout``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client, JobSpec
from pipeline.config.settings import Settings
from pipeline.engines import registry
from pipeline.engines.base import Cancellation, TimesOutRequests
from pipeline.engines.fake.engine import FakeEngine
from storage.errors import Conflict, Interrupted, InvalidJob
from storage.objects.store import ObjectStore
from storage.states import JobState

N = 1000


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    table = pa.table({"id": range(N), "text": [f"document {n % 7} {n}" for n in range(N)]})
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, low, high in (("a", 0, 400), ("b", 400, 450), ("c", 450, N)):
        pq.write_table(table.slice(low, high - low), folder / f"{name}.parquet", row_group_size=100)
    return folder


def fields(texts: Path, out: Path, **more: Any) -> dict[str, Any]:
    base = {"input": str(texts), "output": str(out), "model": "fake", "task": "generate", "prompt": "{text}"}
    return base | more


def ids(out: Path) -> list[int]:
    table = pa.concat_tables([pq.read_table(file) for file in sorted((out / "data").glob("*.parquet"))])
    assert all(
        answer is not None and f"document {n % 7} {n}" in answer
        for n, answer in zip(table["id"].to_pylist(), table["output"].to_pylist(), strict=True)
    )
    return table["id"].to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("limit", "shard_rows"), [(1, 50), (10, 3), (430, 100), (1000, 300), (5000, 300)])
def test_the_first_rows_are_a_job_of_their_own(
    client: Client, texts: Path, tmp_path: Path, limit: int, shard_rows: int
) -> None:
    job = fields(texts, tmp_path / "out", limit=limit, shard_rows=shard_rows)
    found = client.estimate(**job)
    status = client.run(**job)
    assert ids(tmp_path / "out") == list(range(min(limit, N)))
    assert (found.rows, status.rows_total, status.rows_done, status.input_rows) == (*[min(limit, N)] * 3, N)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert client.run(**job).id == status.id  # it is done
    with pytest.raises(Conflict):
        client.run(**fields(texts, tmp_path / "out", shard_rows=shard_rows))


def test_only_the_files_that_hold_the_rows_are_read(
    client: Client, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit(start=False, **fields(texts, tmp_path / "out", limit=150))
    opened: list[str] = []
    store_open = ObjectStore.open

    def noted(self: ObjectStore, uri: str, *more: Any, **named: Any) -> Any:
        opened.append(Path(uri).name)
        return store_open(self, uri, *more, **named)

    monkeypatch.setattr(ObjectStore, "open", noted)
    job.wait(timeout=60)
    assert "a.parquet" in opened
    assert not {"b.parquet", "c.parquet"} & set(opened)


def test_a_sample_is_spread_evenly_and_the_same_each_time(client: Client, texts: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        assert client.run(**fields(texts, tmp_path / out, sample=40, shard_rows=15)).rows_total == 40
    assert ids(tmp_path / "one") == ids(tmp_path / "two") == list(range(0, N, 25))
    client.run(**fields(texts, tmp_path / "all", sample=2 * N))
    assert ids(tmp_path / "all") == list(range(N))


def test_a_limited_job_goes_on_where_it_was_interrupted(settings: Settings, texts: Path, tmp_path: Path) -> None:
    small = settings.model_copy(update={"flush_rows": 20, "read_batch_rows": 10})
    job = fields(texts, tmp_path / "out", limit=300, engine_options={"delay_ms_per_batch": 20})
    with Client(settings=small) as client:
        interrupt = Cancellation()
        with pytest.raises(Interrupted):
            client.run(
                interrupt=interrupt,
                on_progress=lambda status: interrupt.cancel("interrupted") if status.rows_done >= 60 else None,
                **job,
            )
        with pytest.raises(Conflict, match="limit"):
            client.run(**{**job, "limit": 301})
        status = client.run(**job)
    assert status.rows_resumed >= 40
    assert ids(tmp_path / "out") == list(range(300))


@pytest.mark.parametrize("some", [{"limit": 330}, {"sample": 250}])
def test_some_rows_in_prefix_order(settings: Settings, texts: Path, tmp_path: Path, some: dict[str, int]) -> None:
    with Client(settings=settings.model_copy(update={"order_rows": 60})) as client:
        status = client.run(**fields(texts, tmp_path / "out", order="prefix", shard_rows=100, **some))
        assert client.job(status.id).regrouped
    assert ids(tmp_path / "out") == (list(range(330)) if "limit" in some else list(range(0, N, 4)))


def test_some_rows_of_json_lines(client: Client, tmp_path: Path) -> None:
    lines = "".join(f'{{"id": {n}, "text": "document {n % 7} {n}"}}\n' for n in range(50))
    (tmp_path / "in.jsonl").write_text(lines)
    status = client.run(**fields(tmp_path / "in.jsonl", tmp_path / "out", limit=7))
    assert (ids(tmp_path / "out"), status.input_rows) == (list(range(7)), 50)


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": -3}, {"sample": 0}, {"limit": 2**63}, {"limit": 1.5}])
def test_numbers_of_rows_that_cannot_be_are_refused(
    client: Client, texts: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(InvalidJob, match=next(iter(wrong))):
        client.submit(**fields(texts, tmp_path / "out", **wrong))
    with pytest.raises(InvalidJob, match="exclude"):
        client.submit(**fields(texts, tmp_path / "out", limit=1, sample=1))


def test_an_incremental_schedule_takes_whole_files(client: Client, texts: Path, tmp_path: Path) -> None:
    job = fields(texts, tmp_path / "{fire_date:%Y-%m-%d}", sample=5)
    with pytest.raises(InvalidJob, match="incremental"):
        client.schedules.add("nightly", cron="0 3 * * *", job=job, incremental=True)
    client.schedules.add("nightly", cron="0 3 * * *", job=job)


def test_jobs_from_before_there_were_limits_go_on() -> None:
    spec = JobSpec(input=("in",), output="out", model="fake", task="generate", prompt="{text}")  # type: ignore[arg-type]
    assert spec.model_copy(update={"limit": 5}).work_hash() != spec.work_hash()
    older = spec.model_dump(mode="json")
    assert {older.pop(name) for name in ("limit", "sample", "request_timeout")} == {None}
    assert JobSpec(**older).work_hash() == spec.work_hash()


def test_a_row_that_takes_too_long_fails_alone(client: Client, texts: Path, tmp_path: Path) -> None:
    slow = {"slow_row": "document 3 150", "slow_row_ms": 3_600_000}
    job = fields(texts, tmp_path / "out", engine_options=slow, request_timeout=0.05, limit=200)
    status = client.run(**job)
    assert (status.state, status.rows_done, status.rows_failed) == (JobState.COMPLETED, 200, 1)
    [failed] = client.job(status.id).errors()
    assert (failed.row, failed.code) == (150, "request_timeout")
    assert "0.05 s" in failed.message


def test_an_engine_that_aborts_no_rows_refuses_the_timeout(
    client: Client, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fields(texts, tmp_path / "out", request_timeout=1.0)
    for wrong in (0, -1, 1e-9, 1e9, float("inf"), float("nan")):
        with pytest.raises(InvalidJob, match=r"request_timeout: .* is no time limit for a row; give 0\.001 to 604800"):
            client.submit(**{**job, "request_timeout": wrong})
    monkeypatch.setattr(FakeEngine, "timed_tasks", lambda: frozenset())
    with pytest.raises(InvalidJob, match="aborts no single rows") as caught:
        client.submit(**job)
    assert caught.value.field == "request_timeout"
    assert not issubclass(registry.engine_class("onnx"), TimesOutRequests)
