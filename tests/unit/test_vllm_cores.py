"""Which cores vLLM's CPU build is given: all of few, vLLM's own choice of many, and whatever the user has said."""

from __future__ import annotations

import os

import psutil
import pytest

from pipeline.engines.vllm_process import FEW_CORES, core_environment

NAMES = ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("usable", "cores"), [(1, 64), (FEW_CORES, 64), (64, 2), (2, None)])
def test_none_of_few_cores_is_kept_free(monkeypatch: pytest.MonkeyPatch, usable: int, cores: int | None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: cores)
    assert core_environment() == {NAMES[0]: "0"}
    for name in NAMES:
        monkeypatch.setenv(name, "1")
        assert core_environment() == {}
        monkeypatch.delenv(name)


def test_of_many_vllm_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: FEW_CORES + 1)
    assert core_environment() == {}
