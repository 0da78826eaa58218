"""Which adapter vLLM is told to load: by content, from a directory that still holds it."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.engines.vllm_adapters import LoadedAdapters, check
from pipeline.job import absolute
from storage.errors import InvalidJob
from tests.engines.test_vllm_check import make_spec


class Running:
    """Notes what would be loaded."""

    def __init__(self) -> None:
        self.llm = SimpleNamespace(add_lora=lambda request: request)
        self.loaded: list[Any] = []

    def call(self, request: Any) -> Future[None]:
        self.loaded.append(request)
        done: Future[None] = Future()
        done.set_result(None)
        return done


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
