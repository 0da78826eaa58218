"""How vLLM's CPU build is laid out: on all of few cores in one process, and as vLLM or the user chooses otherwise."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pipeline.engines.vllm.process import cpu as vllm_cpu
from pipeline.engines.vllm.process.cpu import ALL_CORES, BOUND, FEW_CORES, SHORT_WAITS, PinnedThreads, arrange, pin
from pipeline.host import cpu as cores

(RESERVED,) = ALL_CORES


def one(**more: Any) -> SimpleNamespace:
    """What is configured for one rank, or for ``more``."""
    parallel = {"world_size": 1, "data_parallel_size": 1, "distributed_executor_backend": "mp"}
    return SimpleNamespace(**parallel | {"worker_extension_cls": ""} | more)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (RESERVED, BOUND, "LD_PRELOAD", *SHORT_WAITS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path / "untold")


def machine(monkeypatch: pytest.MonkeyPatch, usable: int, physical: int | None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)


@pytest.mark.parametrize(
    ("usable", "physical", "quota", "expected"),
    [
        (1, 64, None, 1),
        (FEW_CORES, 64, None, FEW_CORES),
        (64, 2, None, 2),
        (2, None, None, 2),
        (64, 64, "max 100000", None),
        (64, 64, "300000 100000", 3),
        (2, 2, "50000 100000", 1),
        (64, FEW_CORES + 1, None, None),
    ],
)
def test_few_cores(
    monkeypatch: pytest.MonkeyPatch, usable: int, physical: int | None, quota: str | None, expected: int | None
) -> None:
    machine(monkeypatch, usable, physical)
    if quota:
        cores.QUOTA.write_text(quota)
    for said in (None, "0"):
        if said:
            monkeypatch.setenv(RESERVED, said)
        parallel = one()
        if expected is None:  # vLLM chooses
            assert arrange(parallel, {}) == {}
            assert (parallel.distributed_executor_backend, parallel.worker_extension_cls) == ("mp", "")
            continue
        assert arrange(parallel, {}) == ALL_CORES | {"OMP_NUM_THREADS": str(expected)}
        assert parallel.distributed_executor_backend == "uni"
        assert parallel.worker_extension_cls == PinnedThreads.NAME


@pytest.mark.parametrize(
    ("preloaded", "more"),
    [
        ("/a/libgomp.so.1", {}),
        ("/a/libtcmalloc.so /b/libiomp5.so", dict(SHORT_WAITS)),
        ("/a/libomp.so", dict(SHORT_WAITS)),
    ],
)
def test_intels_threads_do_not_wait_for_long(
    monkeypatch: pytest.MonkeyPatch, preloaded: str, more: dict[str, str]
) -> None:
    machine(monkeypatch, 2, 2)
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    assert arrange(one(), {}) == ALL_CORES | {"OMP_NUM_THREADS": "2"} | more
    monkeypatch.setenv("KMP_BLOCKTIME", "7")  # the user's stands
    more = {name: value for name, value in more.items() if name != "KMP_BLOCKTIME"}
    assert arrange(one(), {}) == ALL_CORES | {"OMP_NUM_THREADS": "2"} | more


@pytest.mark.parametrize("more", [{"world_size": 2}, {"data_parallel_size": 2}])
def test_several_ranks_keep_their_processes(monkeypatch: pytest.MonkeyPatch, more: dict[str, int]) -> None:
    machine(monkeypatch, 2, 2)
    parallel = one(**more)
    assert arrange(parallel, {}) == ALL_CORES
    assert (parallel.distributed_executor_backend, parallel.worker_extension_cls) == ("mp", "")


def test_what_the_user_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2, 2)
    parallel = one()
    assert arrange(parallel, {"distributed_executor_backend": "mp"}) == ALL_CORES
    for name in (RESERVED, BOUND):
        monkeypatch.setenv(name, "1")
        assert arrange(parallel, {}) == {}
        monkeypatch.delenv(name)
    assert (parallel.distributed_executor_backend, parallel.worker_extension_cls) == ("mp", "")
    arrange(parallel, {"distributed_executor_backend": "uni"})
    assert parallel.distributed_executor_backend == "uni"
    own = one(worker_extension_cls="mine.Worker")
    arrange(own, {})
    assert own.worker_extension_cls == "mine.Worker"


def test_our_own_worker_is_asked_to_pin_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    async def collective_rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
        calls.append((method, args))
        return [[]]

    def pinned(extension: str, cpus: list[int], quota: int | None = None) -> list[Any]:
        calls.clear()
        monkeypatch.setattr(vllm_cpu, "one_of_each", lambda: cpus)
        monkeypatch.setattr(vllm_cpu, "few_cores", lambda: quota or len(cpus))
        config = SimpleNamespace(parallel_config=one(worker_extension_cls=extension))
        asyncio.run(pin(SimpleNamespace(collective_rpc=collective_rpc), config))
        return calls.copy()

    monkeypatch.setattr(vllm_cpu, "_engines", itertools.count(6))
    assert pinned(PinnedThreads.NAME, [5, 7]) == [("pin_threads", ([5, 7],))]
    assert pinned(PinnedThreads.NAME, [5, 7]) == [("pin_threads", ([7, 5],))]
    for extension, cpus in (
        ("mine", [5, 7]),
        ("", [5, 7]),
        (PinnedThreads.NAME, [5]),
        (PinnedThreads.NAME, [1, 2, 3]),
    ):
        assert pinned(extension, cpus) == []
    assert pinned(PinnedThreads.NAME, [5, 7], quota=1) == []


def test_one_processor_of_each_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path)
    for cpu, siblings in {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 6: "6"}.items():
        place = tmp_path / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(siblings)
    for allowed, chosen in {(0, 1, 4, 5): [4, 5], (0, 1, 5): [0, 5], (6, 9): [6]}.items():
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, allowed=allowed: set(allowed))
        assert cores.one_of_each() == chosen
        assert cores.available_cores() == len(chosen)


@pytest.mark.parametrize(
    "program",
    [SimpleNamespace(), SimpleNamespace(GOMP_parallel=None, omp_get_thread_num=None, omp_get_max_threads=lambda: 3)],
)
def test_no_thread_is_pinned_without_openmp_or_with_another_team(
    monkeypatch: pytest.MonkeyPatch, program: SimpleNamespace
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: program)
    assert PinnedThreads().pin_threads([0, 1]) == []
