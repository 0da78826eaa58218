"""Submitting in a fleet: what the client can see is refused at once, what it cannot see is said and seen later."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from examples.tiny_llama import build_llama
from pipeline import Client
from pipeline.cli.main import app
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.jobs import preflight
from pipeline.jobs.plan_queue import plan_waiting
from storage.errors import EngineMissing, InvalidJob, JobRefused
from storage.fleet import workers
from storage.states import JobState
from tests.jobs.test_hostile_specs import negation


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    build_llama(folder)
    return folder


@pytest.fixture
def client(settings: Settings, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """The client of a fleet without workers."""
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "PATIENCE_SECONDS", 0.0)
    with Client(settings=settings.model_copy(update={"broker_url": redis_url})) as client:
        yield client


def fields(**more: Any) -> dict[str, Any]:
    base = {"input": "in.parquet", "output": "out", "model": "fake", "task": "generate", "prompt": "{text}"}
    return base | more


def plan(client: Client) -> list[str]:
    """What a worker of the fleet plans."""
    return [job.id for job in plan_waiting(client._runtime, lambda: False, Cancellation())]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"prompt": "{txt}"}, "prompt"),
        ({"sampling": {"max_token": 3}}, "sampling.max_token"),
        ({"engine_options": {"nonsense": 3}}, "engine_options.nonsense"),
        ({"sampling": {"structured_outputs": {"json": {"type": "nonsense"}}}}, "sampling.structured_outputs.json"),
        ({"sampling_columns": {"seed": "sed"}}, "sampling_columns.seed"),
        ({"keep_columns": ["nothing"]}, "keep_columns"),
        ({"input": "none.parquet"}, "input"),
        ({"input": "*.csv"}, "input"),
        ({"input": "rows.jsonl", "prompt": "{txt}"}, "prompt"),
        ({"input": "broken.parquet"}, "input"),
        ({"output": "in.parquet/out"}, "output"),
        ({"input": "s4://bucket/in.parquet"}, "input"),
        ({"output": "nosuch://bucket/out"}, "output"),
        ({"model": "nowhere"}, "model"),
    ],
)
def test_what_the_client_can_see_is_refused_at_submit(client: Client, more: dict[str, Any], field: str) -> None:
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InvalidJob) as caught:
        client.submit(**fields(**more))
    assert caught.value.field == field
    assert client.jobs() == []
    assert not Path("out").exists(), "the client left something at the output"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"engine_options": {"max_num_seq": 3}}, "engine_options.max_num_seq"),
        ({"sampling": {"max_token": 3}}, "sampling.max_token"),
        ({"task": "chat", "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"prompt": "{txt}"}, "prompt"),
    ],
)
def test_vllms_own_tables_are_asked_at_submit(client: Client, llama: Path, more: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        client.submit(**fields(model=str(llama), engine="vllm", **more))
    assert caught.value.field == field
    assert client.jobs() == []


def test_a_good_job_is_taken_and_told_that_nobody_serves_it(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipeline.jobs.plan_queue")
    said: list[str] = []
    job = client.submit(on_notice=said.append, **fields())
    assert job.status().state is JobState.VALIDATING
    assert [line for line in said if "no worker serves engine 'fake'" in line] == said
    assert plan(client) == [job.id]
    records = [vars(record) for record in caplog.records]
    assert [(record["action"], record["job_id"]) for record in records] == [
        ("plan.started", job.id),
        ("plan.done", job.id),
    ]
    assert caplog.messages[1].endswith(" s: 2 rows in 1 shards")


def test_a_provider_that_no_worker_has_is_refused(client: Client, tmp_path: Path) -> None:
    job = negation(tmp_path, "y")

    def submit(**options: Any) -> None:
        client.submit(**{**job, "output": f"out-{len(client.jobs())}"}, engine_options=options)

    submit(providers=["CUDAExecutionProvider"])  # a worker that has it may be started yet
    runtime = client._runtime
    cpu = replace(runtime.worker, engines=("onnx",), offers={"onnx": ("CPUExecutionProvider",)})
    workers.register(runtime.database, replace(cpu, id="cpu"))
    with pytest.raises(EngineMissing, match=r"no worker that serves engine 'onnx' has CUDA.*; there are CPU") as caught:
        submit(providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert caught.value.field == "engine_options.providers"
    submit(providers=["CUDAExecutionProvider"], allow_fallback=True)
    submit(providers=["CPUExecutionProvider"])
    workers.register(runtime.database, replace(cpu, id="gpu", offers={"onnx": ("CUDAExecutionProvider",)}))
    submit(providers=["CUDAExecutionProvider"])


def test_what_the_client_cannot_reach_is_said_and_the_rest_is_checked(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(client._runtime.settings.storage_options, "s3", {"endpoint_url": "http://127.0.0.1:9"})
    far = {"input": "s3://bucket/in.parquet"}
    with pytest.raises(InvalidJob, match="max_token"):
        client.submit(**fields(**far, sampling={"max_token": 3}))
    said: list[str] = []
    job = client.submit(on_notice=said.append, **fields(**far))
    assert any("the input cannot be looked at from here" in line for line in said), said
    assert job.status().state is JobState.VALIDATING


def test_a_refusal_by_the_planner_is_seen_by_wait_and_retry(client: Client, tmp_path: Path, redis_url: str) -> None:
    job = client.submit(**fields())
    Path("in.parquet").rename("away.parquet")
    assert plan(client) == []
    with pytest.raises(JobRefused, match=r"in\.parquet"):
        job.wait()
    assert job.status().refused
    with pytest.raises(InvalidJob, match=r"in\.parquet"):
        job.retry()
    assert job.status().state is JobState.FAILED, "what would be refused again is not queued"

    environment = {"ROWMILL_DATA_DIR": str(tmp_path / "data"), "ROWMILL_BROKER_URL": redis_url}
    for command in ("wait", "retry", "resume"):
        told = CliRunner().invoke(app, ["job", command, job.id], env=environment, prog_name="rowmill")
        assert told.exit_code == 2, (command, told.output)
    listed = CliRunner().invoke(app, ["job", "list", "--json"], env=environment, prog_name="rowmill")
    assert json.loads(listed.stdout)["jobs"][0]["refused"] is True

    Path("away.parquet").rename("in.parquet")
    assert job.retry().state is JobState.VALIDATING
    assert plan(client) == [job.id]


def test_submit_with_wait_ends_as_the_job_does(
    client: Client, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner is called where the command would wait for one."""
    from pipeline.client.handle import JobHandle

    wait = JobHandle.wait

    def planned(handle: JobHandle, **how: Any) -> Any:
        Path("in.parquet").unlink()
        plan(client)
        return wait(handle, **how)

    monkeypatch.setattr(JobHandle, "wait", planned)
    environment = {"ROWMILL_DATA_DIR": str(tmp_path / "data"), "ROWMILL_BROKER_URL": redis_url}
    arguments = ["job", "submit", "in.parquet", "-o", "out", "-m", "fake", "-t", "generate", "-p", "{text}", "--wait"]
    told = CliRunner().invoke(app, arguments, env=environment, prog_name="rowmill")
    assert told.exit_code == 2, told.output
    assert "in.parquet" in told.output


def test_a_schedule_is_checked_before_its_input_is_there(client: Client) -> None:
    later = fields(input="later-{fire_date:%Y%m%d}.parquet", output="out-{fire_date:%Y%m%d}")
    with pytest.raises(InvalidJob) as caught:
        client.schedules.add("nightly", cron="0 3 * * *", job=later | {"sampling": {"max_token": 3}})
    assert caught.value.field == "sampling.max_token"
    assert client.schedules.add("nightly", cron="0 3 * * *", job=later).name == "nightly"
