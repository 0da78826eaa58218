"""The embedded mode from end to end, through the public client, with the deterministic engine."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.engines.fake.engine import FakeEngine
from pipeline.process.runtime import Runtime
from pipeline.worker import embedded, maintenance
from storage import failpoints
from storage.errors import Conflict, Interrupted, InvalidInput, InvalidJob, JobCancelled, Unexpected
from storage.queue import jobs
from storage.records import Job
from storage.states import AttemptState, JobState, RequestState
from tests.faults.driver import wait_until

ERROR = pa.struct([("code", pa.string()), ("message", pa.string())])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """1,000 rows in two files with odd row groups; row 77 has no text."""
    table = pa.table(
        {
            "id": pa.array(range(1000), pa.int64()),
            "text": [None if n == 77 else f"text number {n}" for n in range(1000)],
            "tags": [[str(n)] if n % 3 else None for n in range(1000)],
        }
    )
    folder = tmp_path / "texts"
    folder.mkdir()
    pq.write_table(table.slice(0, 600), folder / "a.parquet", row_group_size=130)
    pq.write_table(table.slice(600), folder / "b.parquet", row_group_size=1000)
    return folder


def fields(texts: Path, out: Path, **more: Any) -> dict[str, Any]:
    base = {"input": str(texts), "output": str(out), "model": "fake", "task": "generate", "prompt": "Say: {text}"}
    return base | more


def published(out: Path) -> pa.Table:
    files = sorted((out / "data").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file, page_checksum_verification=True) for file in files])


def test_every_row_once_in_order_with_its_error(client: Client, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status = client.run(**fields(texts, out, shard_rows=300, engine_options={"shuffle": True}))
    assert (status.state, status.rows_done, status.rows_failed) == (JobState.COMPLETED, 1000, 1)
    table = published(out)
    assert table.column("id").to_pylist() == list(range(1000))
    assert table.schema.names[:3] == ["id", "text", "tags"]
    assert table.schema.names[-1] == "error"
    assert table.schema.field("error").type == ERROR
    errors = {n: e["code"] for n, e in enumerate(table.column("error").to_pylist()) if e}
    assert errors == {77: "missing_value"}
    outputs = table.column("output").to_pylist()
    assert outputs[77] is None
    assert all("text number" in text for n, text in enumerate(outputs) if n != 77)
    assert len(set(outputs)) == 1000
    manifest = json.loads((out / "_manifest.json").read_text())
    assert sum(part["rows"] for part in manifest["parts"]) == 1000
    assert (out / "_SUCCESS").exists()
    assert not (out / ".rowmill" / status.id).exists()


def test_shards_and_flushes_do_not_show_in_the_output(settings: Settings, texts: Path, tmp_path: Path) -> None:
    tables = []
    for n, (rows, flush, slots) in enumerate([(1000, 4096, 1), (37, 10, 3)]):
        with Client(settings=settings.model_copy(update={"flush_rows": flush, "slots": slots})) as client:
            client.run(**fields(texts, tmp_path / f"out{n}", shard_rows=rows))
        tables.append(published(tmp_path / f"out{n}"))
    assert tables[0].combine_chunks().equals(tables[1].combine_chunks())


def test_submit_runs_in_the_background_and_the_handle_follows(client: Client, texts: Path, tmp_path: Path) -> None:
    job = client.submit(**fields(texts, tmp_path / "out", keep_columns=["id"], output_prefix="m_"))
    status = job.wait(timeout=60)
    assert status.rows_done == 1000
    assert job.table().schema.names == [
        "id", "m_output", "m_finish_reason", "m_prompt_tokens", "m_cached_tokens", "m_completion_tokens", "error",
    ]  # fmt: skip
    assert [(item.row, item.code) for item in job.errors()] == [(77, "missing_value")]
    assert client.request(job.id[:30], 77).state is RequestState.FAILED
    assert client.request(job.id, 78).state is RequestState.SUCCEEDED
    types = [event.type for event in job.events()]
    assert types[:2] == ["job.validating", "job.queued"]
    assert types[-1] == "job.completed"


def interrupted_run(client: Client, job: dict[str, Any], until: int) -> None:
    """Run the job and interrupt it once ``until`` rows are flushed."""
    interrupt = Cancellation()

    def watch(status: Any) -> None:
        if status.shards.get("running") and status.rows_done >= until:
            interrupt.cancel("interrupted")

    with pytest.raises(Interrupted):
        client.run(**job, interrupt=interrupt, on_progress=watch)


def test_an_interrupted_run_goes_on_where_it_stopped(settings: Settings, texts: Path, tmp_path: Path) -> None:
    job = fields(texts, tmp_path / "out", engine_options={"delay_ms_per_batch": 20})
    small = settings.model_copy(update={"flush_rows": 50, "read_batch_rows": 25})
    with Client(settings=small) as client:
        interrupted_run(client, job, until=200)
        [before] = client.jobs()
        assert before.state is JobState.IN_PROGRESS
        assert 200 <= before.rows_done < 1000
        assert not (tmp_path / "out" / "data").exists()
    with Client(settings=small) as client:
        status = client.run(**job)
        assert status.id == before.id
        attempts = client.job(status.id).attempts()
        assert [a.state for a in attempts] == [AttemptState.RELEASED, AttemptState.SUCCEEDED]
        assert attempts[1].rows_resumed == attempts[0].rows_computed == before.rows_done
        assert attempts[1].rows_computed == 1000 - before.rows_done
    assert published(tmp_path / "out").column("id").to_pylist() == list(range(1000))


def test_other_settings_do_not_resume(settings: Settings, texts: Path, tmp_path: Path) -> None:
    job = fields(texts, tmp_path / "out", engine_options={"delay_ms_per_batch": 20})
    small = settings.model_copy(update={"flush_rows": 50, "read_batch_rows": 25})
    with Client(settings=small) as client:
        interrupted_run(client, job, until=50)
        with pytest.raises(Conflict, match="prompt"):
            client.run(**(job | {"prompt": "Other: {text}"}))


def test_cancelling_publishes_what_is_done_and_retry_goes_on(settings: Settings, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = settings.model_copy(update={"flush_rows": 50, "read_batch_rows": 25})
    with Client(settings=small) as client, Client(settings=small) as other:
        job = client.submit(**fields(texts, out, engine_options={"delay_ms_per_batch": 20}))
        enough = threading.Event()
        while not enough.wait(0.02):
            if job.status().rows_done >= 200:
                other.job(job.id).cancel()
                enough.set()
        with pytest.raises(JobCancelled):
            job.wait(timeout=60)
        status = job.status()
        assert status.state is JobState.CANCELLED
        manifest = json.loads((out / "_manifest.json").read_text())
        assert manifest["partial"] is True
        assert not (out / "_SUCCESS").exists()
        ids = published(out).column("id").to_pylist()
        assert len(ids) == status.rows_done >= 200
        assert ids == sorted(ids)
        missing = manifest["parts"][0]["missing"]
        assert sum(high - low for low, high in missing) == 1000 - len(ids)
        with pytest.raises(Conflict, match="already holds published rows"):
            client.run(**fields(texts, out))
        job.retry()
        assert job.wait(timeout=60).rows_done == 1000
        assert sum(a.rows_computed for a in job.attempts()) == 1000
    assert published(out).column("id").to_pylist() == list(range(1000))
    assert json.loads((out / "_manifest.json").read_text())["partial"] is False


def test_retrying_failed_rows_republishes_one_whole_output(client: Client, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = client.submit(**fields(texts, out, shard_rows=300))
    job.wait(timeout=60)
    before = published(out)
    # The row still has no text, so it fails again; what matters is that only it is computed again.
    assert job.retry().gen == 1
    status = job.wait(timeout=60)
    assert (status.rows_done, status.rows_failed, status.gen) == (1000, 1, 1)
    assert published(out).equals(before)
    assert sum(a.rows_computed for a in job.attempts()) == 1001
    job.retry(failed_only=False)
    assert job.wait(timeout=60).rows_done == 1000
    assert published(out).equals(before)
    assert sum(a.rows_computed for a in job.attempts()) == 2001


def test_a_transient_engine_error_is_retried(client: Client, texts: Path, tmp_path: Path) -> None:
    options = {"die_on": "number 500", "die_times": 1}
    status = client.run(**fields(texts, tmp_path / "out", engine_options=options))
    assert (status.state, status.failures, status.attempts) == (JobState.COMPLETED, 1, 2)


def test_an_engine_that_breaks_its_contract_fails_the_job(settings: Settings, texts: Path, tmp_path: Path) -> None:
    with Client(settings=settings.model_copy(update={"max_failures": 1})) as client:
        for option, reason in (("drop_row", "unanswered"), ("double_row", "twice|already answered")):
            status = client.run(**fields(texts, tmp_path / option, engine_options={option: "number 500"}))
            assert status.state is JobState.FAILED
            assert status.error is not None
            assert re.search(reason, status.error)


def test_too_many_failed_rows_fail_the_job(settings: Settings, texts: Path, tmp_path: Path) -> None:
    with Client(settings=settings.model_copy(update={"flush_rows": 100})) as client:
        options = {"fail_rows_matching": "number 2"}
        status = client.run(**fields(texts, tmp_path / "out", max_failed_rows=5, engine_options=options))
        assert status.state is JobState.FAILED
        assert status.stop_reason == "max_failed_rows"


def test_an_input_that_changes_fails_the_job(settings: Settings, texts: Path, tmp_path: Path) -> None:
    job = fields(texts, tmp_path / "out", engine_options={"delay_ms_per_batch": 20})
    with Client(settings=settings.model_copy(update={"flush_rows": 50, "read_batch_rows": 25})) as client:
        interrupted_run(client, job, until=50)
        pq.write_table(pq.read_table(texts / "b.parquet").slice(1), texts / "b.parquet")
        status = client.run(**job)
        assert status.state is JobState.FAILED
        assert "b.parquet" in (status.error or "")


def test_an_input_without_rows_completes_at_once(client: Client, tmp_path: Path) -> None:
    one = pa.table({"text": ["one"]}).replace_schema_metadata({"where": "from"})
    pq.write_table(one.slice(1), tmp_path / "none.parquet")
    status = client.run(**fields(tmp_path / "none.parquet", tmp_path / "out", output_prefix="my_"))
    assert (status.state, status.rows_total) == (JobState.COMPLETED, 0)
    none = published(tmp_path / "out")
    assert none.num_rows == 0
    pq.write_table(one, tmp_path / "one.parquet")
    client.run(**fields(tmp_path / "one.parquet", tmp_path / "out-one", output_prefix="my_"))
    assert none.schema.equals(published(tmp_path / "out-one").schema, check_metadata=True)


def test_json_lines_are_rows_too(client: Client, tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(50)))
    job = client.submit(**fields(lines, tmp_path / "out"))
    job.wait(timeout=60)
    assert job.table().column("text").to_pylist() == [f"t{n}" for n in range(50)]


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"prompt": "{nothing}"}, InvalidInput, "nothing"),
        ({"sampling": {"max_tokenz": 3}}, InvalidJob, "max_tokenz"),
        ({"engine_options": {"speed": 9}}, InvalidJob, "speed"),
        ({"input": "/nowhere/*.parquet"}, InvalidInput, "nowhere"),
        ({"keep_columns": ["nope"]}, InvalidInput, "nope"),
        ({"model": "/no/such/model"}, InvalidJob, "no/such/model"),
        ({"engine": "warp"}, InvalidJob, "warp"),
    ],
)
def test_what_cannot_work_is_refused_at_submit(
    client: Client, texts: Path, tmp_path: Path, change: dict[str, Any], kind: type[Exception], reason: str
) -> None:
    with pytest.raises(kind, match=reason):
        client.submit(**(fields(texts, tmp_path / "out") | change))
    assert not (tmp_path / "out").exists()


def test_result_columns_may_not_clash_with_kept_ones(client: Client, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "output": ["b"]}), tmp_path / "in.parquet")
    job = fields(tmp_path / "in.parquet", tmp_path / "out")
    with pytest.raises(InvalidJob, match="output_prefix"):
        client.submit(**job)
    client.run(**job, output_prefix="new_")
    assert published(tmp_path / "out").schema.names[:3] == ["text", "output", "new_output"]


def test_a_finished_output_is_only_replaced_on_request(client: Client, texts: Path, tmp_path: Path) -> None:
    job = fields(texts, tmp_path / "out", shard_rows=100)
    client.run(**job)
    with pytest.raises(Conflict, match="overwrite"):
        client.run(**(job | {"prompt": "New: {text}"}))
    client.run(**(job | {"prompt": "New: {text}", "shard_rows": 1000}), overwrite=True)
    assert len(list((tmp_path / "out" / "data").iterdir())) == 1
    assert "New:" in published(tmp_path / "out").column("output")[0].as_py()


def test_a_job_that_does_not_complete_replaces_no_other_output(settings: Settings, texts: Path, tmp_path: Path) -> None:
    job = fields(texts, tmp_path / "out")
    with Client(settings=settings.model_copy(update={"max_failures": 1, "flush_rows": 100})) as client:
        client.run(**job)
        before = published(tmp_path / "out")
        broken = job | {"engine_options": {"drop_row": "number 500"}}
        assert client.run(**broken, overwrite=True).state is JobState.FAILED
    assert published(tmp_path / "out").equals(before)
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_cancel_while_the_job_is_published_stops_nothing(settings: Settings, texts: Path, tmp_path: Path) -> None:
    with Client(settings=settings) as client, Client(settings=settings) as other:
        cancelled: list[JobState] = []

        def cancel() -> None:
            if not cancelled:
                [job] = other.jobs()
                cancelled.append(job.state)
                jobs.request_stop(other._runtime.database, job.id, "cancelled", actor="test")

        failpoints.arm("finalize.part", cancel)
        try:
            status = client.run(**fields(texts, tmp_path / "out", shard_rows=300))
        finally:
            failpoints.disarm()
    assert cancelled == [JobState.FINALIZING]
    assert (status.state, status.rows_done, status.stop_reason) == (JobState.COMPLETED, 1000, None)
    assert published(tmp_path / "out").num_rows == 1000
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_cancel_that_the_last_commit_overtakes_stops_nothing(settings: Settings, texts: Path, tmp_path: Path) -> None:
    """All rows are done when the job has been wound down: it is whole."""
    with Client(settings=settings) as client, Client(settings=settings) as other:

        def cancel() -> None:
            [job] = other.jobs()
            if job.state is JobState.IN_PROGRESS:
                jobs.request_stop(other._runtime.database, job.id, "cancelled", actor="test")

        failpoints.arm("commit.assembled", cancel)
        try:
            status = client.run(**fields(texts, tmp_path / "out"))
        finally:
            failpoints.disarm()
        kinds = [event.type for event in client.job(status.id).events() if event.type.startswith("job.")]
    assert (status.state, kinds[-2:]) == (JobState.COMPLETED, ["job.cancelling", "job.completed"])
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_job_that_is_retried_as_soon_as_it_has_ended_goes_on(
    settings: Settings, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process publishes it and retries it, before the one that ran it has seen its end."""
    original, gens = embedded.finalize_job, []
    with Client(settings=settings) as client, Client(settings=settings) as other:

        def overtaken(runtime: Runtime, job_id: str) -> Job | None:
            if not gens:
                assert original(other._runtime, job_id) is not None
                gens.append(other.job(job_id).retry().gen)
            return original(runtime, job_id)

        monkeypatch.setattr(embedded, "finalize_job", overtaken)
        status = client.run(**fields(texts, tmp_path / "out"))
    assert (gens, status.gen, status.state) == ([1], 1, JobState.COMPLETED)


def test_a_job_ends_when_its_completion_window_passes(settings: Settings, texts: Path, tmp_path: Path) -> None:
    small = settings.model_copy(update={"flush_rows": 50, "read_batch_rows": 25, "lease_seconds": 0.3})
    with Client(settings=small) as client:
        job = fields(texts, tmp_path / "out", engine_options={"delay_ms_per_batch": 100})
        status = client.run(**job, completion_window="1s")
    assert (status.state, status.stop_reason) == (JobState.EXPIRED, "expired")
    assert published(tmp_path / "out").num_rows == status.rows_done < 1000


def test_rows_that_kill_the_engine_are_found_and_the_others_done(client: Client, texts: Path, tmp_path: Path) -> None:
    options = {"die_on": "number 50", "die_times": 1000}  # rows 50 and 500 to 509, each time they are run
    status = client.run(**fields(texts, tmp_path / "out", shard_rows=300, engine_options=options))
    poison = {50, *range(500, 510)}
    assert (status.state, status.rows_done, status.rows_failed) == (JobState.COMPLETED, 1000, 1 + len(poison))
    errors = {n: e["code"] for n, e in enumerate(published(tmp_path / "out").column("error").to_pylist()) if e}
    assert errors == {77: "missing_value"} | dict.fromkeys(poison, "poison_row")
    assert sum(attempt.rows_computed for attempt in client.job(status.id).attempts()) == 1000


def test_failed_rows_of_converted_input_can_be_retried(client: Client, tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"text": None if n == 3 else f"t{n}"}) + "\n" for n in range(50)))
    job = client.submit(**fields(lines, tmp_path / "out"))
    assert job.wait(timeout=60).rows_failed == 1
    job.retry()
    assert job.wait(timeout=60).gen == 1
    assert job.table().column("text").to_pylist() == [None if n == 3 else f"t{n}" for n in range(50)]


def test_garbage_of_a_cancelled_job_goes_after_its_retention(settings: Settings, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = settings.model_copy(update={"flush_rows": 50, "read_batch_rows": 25, "attempt_retention_hours": 0.0})
    job = fields(texts, out, engine_options={"delay_ms_per_batch": 20})
    with Client(settings=small) as client:
        interrupted_run(client, job, until=200)
        [status] = client.jobs()
        handle = client.job(status.id)
        kept = handle.cancel().rows_done
        assert published(out).num_rows == kept
        assert (out / ".rowmill").exists()
        assert maintenance.collect_garbage(client._runtime) == 1
        assert not (out / ".rowmill").exists()
        # What was flushed is gone with it, so a retry computes everything again.
        handle.retry()
        assert handle.wait(timeout=60).rows_done == 1000
        assert sum(attempt.rows_computed for attempt in handle.attempts()) == 1000 + kept
    assert published(out).column("id").to_pylist() == list(range(1000))


def test_what_was_published_stays_when_a_retry_has_less(settings: Settings, texts: Path, tmp_path: Path) -> None:
    """Its part files are collected, it is retried and cancelled again: the published file is the only copy now."""
    out = tmp_path / "out"
    small = settings.model_copy(update={"flush_rows": 50, "read_batch_rows": 25, "attempt_retention_hours": 0.0})
    small = small.model_copy(update={"lease_seconds": 0.5})
    with Client(settings=small) as client:
        interrupted_run(client, fields(texts, out, engine_options={"delay_ms_per_batch": 20}), until=200)
        [status] = client.jobs()
        handle = client.job(status.id)
        kept = handle.cancel().rows_done
        before = json.loads((out / "_manifest.json").read_text())
        assert maintenance.collect_garbage(client._runtime) == 1
        handle.retry()
        failpoints.arm("finalize.manifest", _die)
        try:
            with pytest.raises(Unexpected) as raised:
                handle.cancel()
        finally:
            failpoints.disarm()
        assert isinstance(raised.value.__cause__, _Died)
        assert not (out / "_manifest.json").exists()
        wait_until(lambda: handle.cancel().state is JobState.CANCELLED, "the end of the lease of the one that died")
        after = json.loads((out / "_manifest.json").read_text())
        assert published(out).num_rows == kept
        assert after["parts"] == before["parts"]
        assert after["missing"] == before["missing"] == [[kept, 1000]]
        handle.retry()
        assert handle.wait(timeout=60).rows_done == 1000
    assert published(out).column("id").to_pylist() == list(range(1000))


class _Died(Exception):
    pass


def _die() -> None:
    raise _Died


def test_an_idempotency_key_is_one_job(client: Client, texts: Path, tmp_path: Path) -> None:
    job = fields(texts, tmp_path / "out", idempotency_key="tuesday")
    first = client.submit(**job)
    first.wait(timeout=60)
    assert client.submit(**job).id == first.id
    with pytest.raises(Conflict, match="belongs to job"):
        client.submit(**(job | {"prompt": "Other: {text}"}))
    with pytest.raises(Conflict, match="already holds published rows"):
        client.submit(**(job | {"idempotency_key": "wednesday"}))


def test_the_same_request_after_it_is_done_does_nothing(client: Client, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = client.run(**fields(texts, out))
    notices: list[str] = []
    again = client.run(**fields(texts, out), on_notice=notices.append)
    assert (again.id, again.state, again.attempts) == (done.id, JobState.COMPLETED, done.attempts)
    assert "has done this already" in notices[-1]
    with pytest.raises(Conflict, match="already holds published rows"):
        client.run(**fields(texts, out, prompt="Other: {text}"))
    first = sorted(texts.glob("*.parquet"))[0]
    pq.write_table(pq.read_table(first).slice(1), first)
    with pytest.raises(Conflict, match="already holds published rows"):
        client.run(**fields(texts, out))  # the input has changed
    assert client.run(**fields(texts, out, overwrite=True)).rows_done == 999


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.json"])
def test_what_was_converted_and_is_done_is_not_done_again(client: Client, tmp_path: Path, name: str) -> None:
    source, out = tmp_path / name, tmp_path / "out"
    content = {"in.csv": "text\na\nb\n", "in.json": '[{"text":"a"},{"text":"b"}]'}
    source.write_text(content.get(name, '{"text":"a"}\n{"text":"b"}\n'))
    done = client.run(**fields(source, out))
    again = client.run(**fields(source, out))
    assert (again.id, again.state, again.attempts) == (done.id, JobState.COMPLETED, done.attempts)
    source.write_text(content.get(name, '{"text":"a"}\n{"text":"b"}\n').replace("b", "c"))
    with pytest.raises(Conflict, match="already holds published rows"):
        client.run(**fields(source, out))  # the input has changed


def test_types_that_clash_matter_where_the_column_is_used(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1], "x": [1], "s": [{"a": 1}]}), folder / "1.parquet")
    pq.write_table(pa.table({"id": [2], "x": ["two"], "s": [[1]]}), folder / "2.parquet")
    with pytest.raises(InvalidInput, match=r"'x' is int64 in .*1\.parquet and string in .*2\.parquet.*keep_columns"):
        client.submit(**fields(folder, tmp_path / "out", prompt="{id}"))
    with pytest.raises(InvalidInput, match=r"'x' is int64 in .*1\.parquet and string in .*2\.parquet"):
        client.submit(**fields(folder, tmp_path / "out", prompt="{x}", keep_columns=["id"]))
    client.run(**fields(folder, tmp_path / "out", prompt="{id}", keep_columns=["id"]))
    assert published(tmp_path / "out").column("id").to_pylist() == [1, 2]


class _Panic(BaseException):
    """As a library in Rust raises."""


@pytest.mark.parametrize("raised", [SystemExit(3), _Panic("at the disco")], ids=["sys.exit", "panic"])
@pytest.mark.parametrize("where", ["load", "infer", "stats"])
def test_whatever_an_engine_raises_is_its_attempts_failure(
    settings: Settings, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, raised: BaseException
) -> None:
    def fails(*_: object) -> None:
        raise raised

    monkeypatch.setattr(FakeEngine, where, fails)
    with Client(settings=settings.model_copy(update={"max_failures": 2})) as client:
        status = client.run(**fields(texts, tmp_path / "out"))
        assert (status.state, status.failures) == (JobState.FAILED, 2)
        assert type(raised).__name__ in (status.error or "")
