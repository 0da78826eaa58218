"""Which adapter vLLM is told to load: by content, from a directory that still holds it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.tiny_llama import build_llama
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.engines.vllm.prompts.lora import LoadedAdapters, check
from pipeline.execution.attempt import execute
from pipeline.jobs.plan import plan_job
from pipeline.jobs.preflight import absolute
from pipeline.jobs.submit import submit_job
from pipeline.models.adapters import digests
from pipeline.planning.plan import PlanRecord
from pipeline.process.heartbeat import LeaseKeeper
from pipeline.process.runtime import start
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidJob
from storage.queue import claims, jobs
from tests.engines.vllm.models.tiny_adapter import build_adapter
from tests.engines.vllm.options.test_check import make_spec


class Running:
    """Notes what would be loaded."""

    def __init__(self) -> None:
        self.llm = SimpleNamespace(add_lora=lambda request: request)
        self.loaded: list[Any] = []

    def ask(self, request: Any) -> None:
        self.loaded.append(request)


def adapter(folder: Path, content: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(content)
    return folder


@pytest.mark.vllm
def test_an_adapter_is_loaded_again_from_where_its_content_still_is(tmp_path: Path) -> None:
    running: Any = Running()
    loaded = LoadedAdapters(tmp_path / "cache")
    first, second = adapter(tmp_path / "first", "red"), adapter(tmp_path / "second", "red")
    one = loaded.load(running, "a", first)
    assert loaded.load(running, "a", second) is one, "the same content, and the first directory has it still"
    adapter(first, "green, and longer")
    two = loaded.load(running, "a", second)
    assert (two.lora_path, two.lora_name) == (str(second), one.lora_name)
    assert two.lora_int_id != one.lora_int_id
    assert loaded.load(running, "a", first).lora_name != one.lora_name
    assert len(running.loaded) == 3


def test_the_home_of_nobody_is_refused() -> None:
    spec = make_spec(adapters={"a": "~no such user/x"}, engine_options={"enable_lora": True})
    for look in (check, absolute):
        with pytest.raises(InvalidJob, match="no such user") as caught:
            look(spec)
        assert caught.value.field == "adapters.a"


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    build_llama(tmp_path / "llama")
    build_adapter(tmp_path / "adapter", seed=1)
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "rows.parquet")
    return {
        "input": str(tmp_path / "rows.parquet"),
        "output": str(tmp_path / "out"),
        "model": str(tmp_path / "llama"),
        "task": "generate",
        "prompt": "{text}",
        "adapters": {"a": str(tmp_path / "adapter")},
        "engine_options": {"enable_lora": True},
    }


def test_an_adapter_that_changed_is_not_mixed_into_the_job_that_was_planned_with_it(
    fields: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    runtime = start(settings)
    try:
        runtime.register()
        planned = plan_job(runtime, submit_job(runtime, fields))
        (digest,) = PlanRecord.from_json(planned.plan).adapters.values()
        shutil.rmtree(tmp_path / "adapter")
        build_adapter(tmp_path / "adapter", seed=2)
        with LeaseKeeper(runtime.database, worker_id=runtime.worker.id, lease_seconds=60.0) as keeper:
            claim = claims.claim(runtime.database, owner=runtime.worker.id, lease_seconds=60.0, job_id=planned.id)
            assert claim is not None
            execute(runtime, claim, keeper, Cancellation())
        stopped = jobs.get(runtime.database, planned.id)
        assert stopped.stop_reason == "failed" and "adapters.a: it changed" in str(stopped.error)
        assert digests(JobSpec(**planned.spec).adapters, settings.cache_dir) != {"a": digest}
    finally:
        runtime.close()
