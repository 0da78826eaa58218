"""Engines that are started again: one that has grown too much, one that is stuck."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from examples.tiny_llama import build_llama
from pipeline.engines.base import Cancellation, EngineContext
from pipeline.engines.pool import EnginePool
from pipeline.engines.testing import run
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.models.resolve import resolve
from storage.errors import EngineDead
from tests.engines.vllm import support

pytestmark = pytest.mark.vllm
STALL_SECONDS = 10.0
"""Longer than any step of the tiny model, on a busy machine too."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    pool = EnginePool(EngineContext(tmp_path_factory.mktemp("cache")))
    yield pool
    pool.close()


def test_an_engine_that_has_grown_and_one_that_is_stuck(pool: EnginePool, tmp_path: Path) -> None:
    model = resolve(str(build_llama(tmp_path / "llama")), tmp_path)
    options: dict[str, Any] = {**support.OPTIONS, "recycle_bytes": 1, "stall_seconds": STALL_SECONDS}
    spec = support.make_spec(engine_options=options, sampling={"max_tokens": 200, "ignore_eos": True})

    def lease() -> Any:
        return pool.lease("vllm", model, spec.task, options)

    with lease() as engine:
        first = cast(VllmEngine, engine)
        (core,) = (psutil.Process(pid) for pid in first._loaded().running.pids)
        assert not first.needs_restart()
        assert len(run(engine, spec, [support.texts("a")])) == 1
        # Whoever holds it goes on with it.
        assert first.needs_restart() and core.is_running()
        assert len(run(engine, spec, [support.texts("b")])) == 1
    assert not core.is_running()

    with lease() as engine:
        assert engine is not first
        second = cast(VllmEngine, engine)
        (pid,) = second._loaded().running.pids
        caught: list[EngineDead] = []

        def call() -> None:
            with pytest.raises(EngineDead) as raised:
                for _ in found:
                    pass
            caught.append(raised.value)

        found = second.infer(spec, support.endless(), Cancellation())
        next(found)
        waiting = threading.Thread(target=call)
        os.kill(pid, signal.SIGSTOP)
        waiting.start()
        waiting.join()
        assert "took no step for 10 s" in str(caught[0])
        assert not psutil.pid_exists(pid)


def test_an_engine_that_hangs_while_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, watch, pids = build_llama(tmp_path / "llama"), RunningVllm._watch, []

    def hang(self: RunningVllm, pid: int) -> None:
        watch(self, pid)
        os.kill(pid, signal.SIGSTOP)
        pids.append(pid)

    monkeypatch.setattr(RunningVllm, "_watch", hang)
    with pytest.raises(EngineDead, match="was starting and did nothing for 5 s, and was ended"):
        RunningVllm(str(model), support.OPTIONS, 5.0)
    (pid,) = pids
    assert not psutil.pid_exists(pid)
