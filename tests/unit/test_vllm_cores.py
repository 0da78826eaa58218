"""How vLLM's CPU build is laid out: on all of few cores in one process, and as vLLM or the user chooses otherwise."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest

from pipeline.engines.vllm_cpu import ALL_CORES, BOUND, FEW_CORES, arrange

(RESERVED,) = ALL_CORES


def one() -> SimpleNamespace:
    return SimpleNamespace(world_size=1, data_parallel_size=1, distributed_executor_backend="mp")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (RESERVED, BOUND):
        monkeypatch.delenv(name, raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, usable: int, cores: int | None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: cores)


@pytest.mark.parametrize(("usable", "cores"), [(1, 64), (FEW_CORES, 64), (64, 2), (2, None)])
def test_few_cores(monkeypatch: pytest.MonkeyPatch, usable: int, cores: int | None) -> None:
    machine(monkeypatch, usable, cores)
    expected = ALL_CORES | {"OMP_NUM_THREADS": str(min(usable, cores or usable))}
    for said in (None, "0"):
        if said:
            monkeypatch.setenv(RESERVED, said)
        parallel = one()
        assert arrange(parallel, {}) == expected
        assert parallel.distributed_executor_backend == "uni"


@pytest.mark.parametrize("more", [{"world_size": 2}, {"data_parallel_size": 2}])
def test_several_ranks_keep_their_processes(monkeypatch: pytest.MonkeyPatch, more: dict[str, int]) -> None:
    machine(monkeypatch, 2, 2)
    parallel = SimpleNamespace(**(vars(one()) | more))
    assert arrange(parallel, {}) == ALL_CORES
    assert parallel.distributed_executor_backend == "mp"


def test_what_the_user_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2, 2)
    parallel = one()
    assert arrange(parallel, {"distributed_executor_backend": "mp"}) == ALL_CORES
    for name in (RESERVED, BOUND):
        monkeypatch.setenv(name, "1")
        assert arrange(parallel, {}) == {}
        monkeypatch.delenv(name)
    assert parallel.distributed_executor_backend == "mp"
    arrange(parallel, {"distributed_executor_backend": "uni"})
    assert parallel.distributed_executor_backend == "uni"


def test_of_many_cores_vllm_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 64, FEW_CORES + 1)
    parallel = one()
    assert arrange(parallel, {}) == {}
    assert parallel.distributed_executor_backend == "mp"
