"""Jobs that keep their answers, end to end on a real vLLM: a second job, a crash in between, two jobs at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.tiny_llama import build_llama
from pipeline import Client
from pipeline.cli.job.commands import describe_measured
from pipeline.config.settings import Settings
from pipeline.spec.job_spec import parse
from pipeline.worker.maintenance import collect_results
from storage.errors import InvalidJob
from storage.states import JobState

ROWS, SHARD_ROWS = 90, 30
DISTINCT = 59
"""Prompts of the first two shards, which are all different; the third may find some of them kept already."""
ROOT = Path(__file__).parents[2]

KILLED = """
import json, os, sys
from pipeline import Client
from pipeline.config.settings import Settings
from storage import failpoints

settings, fields = json.loads(sys.stdin.read())
failpoints.arm("cache.stored", lambda: os._exit(137))
Client(settings=Settings(**settings)).run(**fields)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    build_llama(folder / "llama")
    texts = [None if n == 7 else f"parcel number {n % 60} of {n % 60 * 7 % 13}" for n in range(ROWS)]
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet")
    return folder


@pytest.fixture(scope="module")
def settings(folder: Path) -> Settings:
    return Settings(data_dir=folder / "data", cache_dir=folder / "cache", result_cache=str(folder / "kept"))


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings) as client:
        yield client


def fields(folder: Path, out: str, **more: Any) -> dict[str, Any]:
    base = {
        "input": str(folder / "texts.parquet"),
        "output": str(folder / out),
        "model": str(folder / "llama"),
        "task": "generate",
        "prompt": "Say: {text}",
        "sampling": {"temperature": 0, "max_tokens": 8},
        "engine_options": {"dtype": "float32", "max_model_len": 128},
        "shard_rows": SHARD_ROWS,
        "cache": "on",
    }
    return base | more


def with_other_weights(model: Path, path: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, path)
    for file in path.glob("*.safetensors"):
        save_file({name: -tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return path


def published(folder: Path, out: str) -> pa.Table:
    # Of a row that was answered before, no token of the prompt was computed.
    return pq.read_table(folder / out / "data").drop_columns("cached_tokens")


@pytest.mark.vllm
def test_a_worker_that_dies_between_keeping_answers_and_its_commit(folder: Path, settings: Settings) -> None:
    places = {name: str(getattr(settings, name)) for name in ("data_dir", "cache_dir", "result_cache")}
    # One shard at a time: rows that another one has flushed, but not kept yet, would be lost to later jobs.
    given = json.dumps([{**places, "slots": 1}, fields(folder, "one")])
    died = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=given,
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert died.returncode == 137, died.stderr
    assert not (folder / "one" / "data").exists()
    assert len(list((folder / "kept").rglob("*.parquet"))) == 1


@pytest.mark.vllm
def test_the_same_job_again_computes_nothing(folder: Path, client: Client) -> None:
    one = client.run(**fields(folder, "one"))  # goes on with the one that died
    assert (one.state, one.rows_done, one.rows_failed) == (JobState.COMPLETED, ROWS, 1)
    two = client.run(**fields(folder, "two", shard_rows=1000))
    assert (two.state, two.rows_done, two.rows_failed) == (JobState.COMPLETED, ROWS, 1)
    measured = client.job(two.id).measured()
    assert measured["cache_hits"] == ROWS - 1
    assert not measured.get("cache_misses") and not measured.get("prompt_tokens")
    assert published(folder, "two").equals(published(folder, "one"))
    plain = client.run(**fields(folder, "plain", cache="off"))
    assert published(folder, "plain").equals(published(folder, "one"))
    assert "cache_hits" not in client.job(plain.id).measured()

    shown = dict(describe_measured(measured))
    assert shown["cached results"] == f"{ROWS - 1} rows were answered before (100.0%)"
    manifest = json.loads((folder / "two" / "_manifest.json").read_text())
    assert manifest["measured"]["cache_hits"] == ROWS - 1 and manifest["spec"]["cache"] == "on"
    assert manifest["tokens"]["completion_tokens"] == one.tokens["completion_tokens"]


@pytest.mark.vllm
def test_two_jobs_at_the_same_time_and_another_tenant(folder: Path, client: Client) -> None:
    more = {"prompt": "Tell: {text}", "tenant": "both"}
    jobs = [client.submit(**fields(folder, out, **more)) for out in ("three", "four")]
    for job in jobs:
        assert job.wait(timeout=240).state is JobState.COMPLETED
    assert published(folder, "three").equals(published(folder, "four"))
    five = client.run(**fields(folder, "five", **more))
    assert client.job(five.id).measured()["cache_hits"] == ROWS - 1
    assert published(folder, "five").equals(published(folder, "three"))
    other = client.run(**fields(folder, "other", **{**more, "tenant": "other"}))
    assert client.job(other.id).measured()["cache_misses"] >= DISTINCT


@pytest.mark.vllm
def test_a_model_that_changed_and_garbage(folder: Path, client: Client, settings: Settings) -> None:
    changed = with_other_weights(folder / "llama", folder / "changed")
    six = client.run(**fields(folder, "six", model=str(changed)))
    assert client.job(six.id).measured()["cache_misses"] >= DISTINCT
    assert published(folder, "six")["output"] != published(folder, "one")["output"]
    kept = list((folder / "kept").rglob("*.parquet"))
    assert collect_results(client._runtime) == (0, 0)
    limited = client._runtime.settings.model_copy(update={"result_cache_bytes": 0})
    object.__setattr__(client._runtime, "settings", limited)
    assert collect_results(client._runtime)[0] == len(kept) > 0
    assert not list((folder / "kept").rglob("*.parquet"))


def test_true_is_on_and_it_is_no_part_of_the_work(folder: Path) -> None:
    specs = [parse(fields(folder, "out", cache=value)) for value in (True, "on", False, "sampled")]
    assert [spec.cache for spec in specs] == ["on", "on", "off", "sampled"]
    assert len({spec.work_hash() for spec in specs}) == 1
    with pytest.raises(InvalidJob, match="cache"):
        parse(fields(folder, "out", cache="always"))


def test_engines_that_keep_nothing_say_so(folder: Path, tmp_path: Path) -> None:
    with Client(settings=Settings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")) as client:
        with pytest.raises(InvalidJob, match="engine 'fake' caches no answers of task 'generate'"):
            client.submit(**fields(folder, "out", model="fake", engine_options={}))
        with pytest.raises(InvalidJob, match="drawn at random"):
            client.submit(**fields(folder, "out", sampling={}))
