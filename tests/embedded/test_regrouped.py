"""``order="prefix"`` over many shards: they hold what begins alike; everything a user sees counts the input's rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from storage import failpoints
from storage.errors import Conflict, Interrupted, JobCancelled
from storage.fleet import garbage
from storage.queue import regrouped_rows
from storage.states import JobState, RequestState
from tests.conftest import S3

N = 1200
BAD = 77


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings) as client:
        yield client
    failpoints.disarm()


def text(row: int) -> str | None:
    """30 documents, dealt out over all of the input."""
    return None if row == BAD else f"document {row % 30:02d} " * 5 + f"question {row}"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    table = pa.table(
        {
            "id": range(N),
            "text": [text(row) for row in range(N)],
            "kind": pa.array([f"k{row % 3}" for row in range(N)]).dictionary_encode(),
        }
    )
    folder = tmp_path / "texts"
    for number, (low, high) in enumerate([(0, 500), (500, N)]):
        (folder / f"day={number}").mkdir(parents=True)
        pq.write_table(table.slice(low, high - low), folder / f"day={number}" / "a.parquet", row_group_size=130)
    return folder


def fields(texts: Path, out: Path, **more: Any) -> dict[str, Any]:
    base = {
        "input": str(texts),
        "output": str(out),
        "model": "fake",
        "task": "generate",
        "prompt": "{text}",
        "order": "prefix",
        "shard_rows": 100,
    }
    return base | more


def test_the_output_is_that_of_input_order(client: Client, texts: Path, tmp_path: Path) -> None:
    plain = client.run(**fields(texts, tmp_path / "plain", order="input"))
    done = client.run(**fields(texts, tmp_path / "out"))
    assert (done.state, done.rows_done, done.rows_failed) == (JobState.COMPLETED, N, 1)
    assert client.job(done.id).table().equals(client.job(plain.id).table())
    found = [json.loads((tmp_path / name / "_manifest.json").read_text()) for name in ("plain", "out")]
    assert found[0]["inputs"] == found[1]["inputs"]
    wanted = [{name: part[name] for name in ("path", "row_start", "rows")} for part in found[1]["parts"]]
    assert wanted == [{"path": f"data/part-{i:05d}.parquet", "row_start": 100 * i, "rows": 100} for i in range(12)]
    assert sum(part["rows_failed"] for part in found[1]["parts"]) == 1
    # The same command again: nothing to do.
    assert client.run(**fields(texts, tmp_path / "out")).id == done.id


def test_a_shard_holds_what_begins_alike(client: Client, texts: Path, tmp_path: Path) -> None:
    handle = client.submit(**fields(texts, tmp_path / "out", keep_columns=["id"]))
    assert handle.wait().state is JobState.COMPLETED
    assert handle.regrouped
    rows: list[int] = []
    documents: Counter[int] = Counter()
    for shard in handle.shards():
        held = regrouped_rows.of_shard(client._runtime.database, shard)
        assert held is not None
        assert len(held) == shard.row_n <= 100
        rows += held
        documents.update({row % 30 for row in held if row != BAD})
    assert sorted(rows) == list(range(N))
    assert max(documents.values()) == 1  # each document in one shard: 40 rows of it fit, beside another


def test_rows_are_named_as_the_input_numbers_them(client: Client, texts: Path, tmp_path: Path) -> None:
    done = client.run(**fields(texts, tmp_path / "out"))
    handle = client.job(done.id)
    assert [(item.row, item.code) for item in handle.errors()] == [(BAD, "missing_value")]
    status = client.request(done.id, BAD)
    assert (status.state, status.code) == (RequestState.FAILED, "missing_value")
    for row in (0, 99, 100, 700, N - 1):
        status = client.request(done.id, row)
        assert status.state is RequestState.SUCCEEDED
        assert status.output is not None
        assert row in pq.read_table(status.output).column("id").to_pylist()


def test_failed_rows_are_retried_and_the_whole_is_published_again(client: Client, texts: Path, tmp_path: Path) -> None:
    done = client.run(**fields(texts, tmp_path / "out"))
    before = client.job(done.id).table()
    client.job(done.id).retry()
    again = client.job(done.id).wait()
    assert (again.gen, again.rows_done, again.rows_failed) == (1, N, 1)
    assert client.job(done.id).table().equals(before)
    assert [item.row for item in client.job(done.id).errors()] == [BAD]


def test_a_cancelled_job_keeps_what_it_finished_and_goes_on_from_it(
    client: Client, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    commits = 0

    def strike() -> None:
        nonlocal commits
        commits += 1
        if commits == 3:
            [job] = client.jobs()
            client.job(job.id).cancel()

    failpoints.arm("commit.done", strike)
    cancelled = client.run(**fields(texts, out))
    failpoints.disarm()
    assert cancelled.state is JobState.CANCELLED
    found = client.job(cancelled.id).table().column("id").to_pylist()
    assert 0 < len(found) < N
    assert found == sorted(set(found))
    manifest = json.loads((out / "_manifest.json").read_text())
    missing = {row for low, high in manifest["missing"] for row in range(low, high)}
    assert manifest["partial"]
    assert missing == set(range(N)) - set(found)
    assert not (out / "_SUCCESS").exists()
    for row in (found[0], min(missing)):
        state = RequestState.SUCCEEDED if row in found else RequestState.CANCELLED
        assert client.request(cancelled.id, row).state is state or row == BAD
    client.job(cancelled.id).retry()
    done = client.job(cancelled.id).wait()
    assert done.state is JobState.COMPLETED
    assert client.job(done.id).table().column("id").to_pylist() == list(range(N))


def test_the_input_may_change_once_it_was_copied(client: Client, texts: Path, tmp_path: Path) -> None:
    failpoints.arm("claim.taken", lambda: [path.unlink() for path in texts.rglob("*.parquet")])
    done = client.run(**fields(texts, tmp_path / "out"))
    assert done.state is JobState.COMPLETED
    assert client.job(done.id).table().column("text").to_pylist() == [text(row) for row in range(N)]


def test_interrupted_while_rows_are_copied(client: Client, texts: Path, tmp_path: Path) -> None:
    """Nothing is left behind but the job: the same command plans it at once, and runs it."""
    interrupt = Cancellation()
    failpoints.arm("plan.sampled", lambda: interrupt.cancel("test"))
    with pytest.raises(Interrupted, match="nothing was run yet"):
        client.run(**fields(texts, tmp_path / "out"), interrupt=interrupt)
    failpoints.disarm()
    [before] = client.jobs()
    assert before.state is JobState.VALIDATING
    done = client.run(**fields(texts, tmp_path / "out"))
    assert (done.id, done.state) == (before.id, JobState.COMPLETED)


def test_what_was_deleted_can_only_be_computed_again(client: Client, texts: Path, tmp_path: Path) -> None:
    done = client.run(**fields(texts, tmp_path / "out"))
    client._runtime.store.delete_tree(str(tmp_path / "out" / ".rowmill" / done.id))
    job = client.job(done.id)
    with pytest.raises(Conflict, match="--all' computes every row again"):
        job.retry()
    job.retry(failed_only=False)
    assert job.wait(timeout=60).state is JobState.COMPLETED
    assert job.table().column("id").to_pylist() == list(range(N))
    assert sum(attempt.rows_computed for attempt in job.attempts()) == 2 * N


def test_jsonl_and_a_handful_of_rows_a_shard(client: Client, tmp_path: Path) -> None:
    """More files than are merged at a time, from rows that were converted first."""
    lines = [json.dumps({"id": row, "text": f"{row % 7} begins {row}"}) for row in range(120)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    done = client.run(**fields(tmp_path / "in.jsonl", tmp_path / "out", shard_rows=3))
    assert done.shards["committed"] > 32
    table = client.job(done.id).table()
    assert table.column("id").to_pylist() == list(range(120))
    assert [row.split()[-1] for row in table.column("text").to_pylist()] == [str(row) for row in range(120)]


def test_few_rows_are_left_where_they_are(client: Client, texts: Path, tmp_path: Path) -> None:
    done = client.run(**fields(texts, tmp_path / "out", shard_rows=N))
    assert not client.job(done.id).regrouped
    same = client.run(**fields(texts, tmp_path / "same", prompt="Always the same", keep_columns=[]))
    assert not client.job(same.id).regrouped


def test_at_an_object_store(settings: Settings, s3: S3, texts: Path) -> None:
    bucket = s3fs.S3FileSystem(**s3.storage_options["s3"], use_listings_cache=False, skip_instance_cache=True)
    for number in (0, 1):
        bucket.put_file(str(texts / f"day={number}" / "a.parquet"), f"{s3.bucket}/in/day={number}/a.parquet")
    with Client(settings=settings.model_copy(update={"storage_options": s3.storage_options})) as client:
        done = client.run(**(fields(texts, texts) | {"input": s3.url("in"), "output": s3.url("out")}))
        assert done.state is JobState.COMPLETED
        table = client.job(done.id).table()
    assert table.column("id").to_pylist() == list(range(N))
    assert table.column("day").to_pylist() == [0] * 500 + [1] * (N - 500)


def test_a_planner_with_another_limit_writes_chunks_of_its_own(settings: Settings, texts: Path, tmp_path: Path) -> None:
    """It cuts elsewhere, so what the one before left must not be taken for its own."""
    many = tmp_path / "many.parquet"
    pq.write_table(pa.table({"id": range(2000), "text": [f"{n % 40:02d}" * 600 + f" {n}" for n in range(2000)]}), many)
    with Client(settings=settings) as client:
        failpoints.arm("plan.chunk", _killed)
        with pytest.raises(_Killed):
            client.run(**fields(many, tmp_path / "out"))
        failpoints.disarm()
    with Client(settings=settings.model_copy(update={"order_bytes": 2**20})) as client:
        done = client.run(**fields(many, tmp_path / "out"))
        assert (done.state, done.rows_total, done.rows_done) == (JobState.COMPLETED, 2000, 2000)
        table = client.job(done.id).table()
    assert table.column("id").to_pylist() == list(range(2000))
    assert all(output.startswith("fake:") for output in table.column("output").to_pylist())


class _Killed(BaseException):
    pass


def _killed() -> None:
    raise _Killed


def test_a_row_that_is_no_prompt_fails_alone(client: Client, tmp_path: Path) -> None:
    ids = [[row % 7] * 20 + [row] for row in range(400)]
    ids[33][5] = None  # type: ignore[call-overload]
    pq.write_table(pa.table({"ids": pa.array(ids, pa.list_(pa.int64()))}), tmp_path / "in.parquet")
    job = fields(tmp_path / "in.parquet", tmp_path / "out", prompt=None, prompt_token_column="ids")
    done = client.run(**job)
    assert (done.state, done.rows_done) == (JobState.COMPLETED, 400)


def test_what_was_published_stays_when_a_retry_has_less(settings: Settings, texts: Path, tmp_path: Path) -> None:
    """Its flushed rows were collected, its chunks not: it is retried and cancelled before it has as many again."""
    out = tmp_path / "out"
    small = settings.model_copy(update={"flush_rows": 20, "read_batch_rows": 10})
    job = fields(texts, out, engine_options={"delay_ms_per_batch": 10})
    with Client(settings=small) as client:
        status = client.submit(**job)
        failpoints.arm("flush.recorded", status.cancel)
        with pytest.raises(JobCancelled):
            status.wait(timeout=60)
        failpoints.disarm()
        before = json.loads((out / "_manifest.json").read_text())
        assert 0 < before["rows"]["published"] < N
        runtime = client._runtime
        assert garbage.give_up(runtime.database, garbage.Garbage("/work", status.id, 0.0))
        status.retry()
        assert status.cancel().state is JobState.CANCELLED
    after = json.loads((out / "_manifest.json").read_text())
    assert after["parts"] == before["parts"]
    ids = [n for file in sorted((out / "data").iterdir()) for n in pq.read_table(file).column("id").to_pylist()]
    assert len(ids) == before["rows"]["published"]
