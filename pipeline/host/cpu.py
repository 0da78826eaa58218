"""The processors that this process may compute on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

TOPOLOGY = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Physical cores that this process may use: affinity and the container's CPU quota count."""
    usable = len(os.sched_getaffinity(0))
    cores = len(one_of_each()) or min(usable, psutil.cpu_count(logical=False) or usable)
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return max(1, cores)
    return max(1, cores if quota == "max" else min(cores, int(quota) // int(period)))


def one_of_each() -> list[int]:
    """One logical processor of each physical core that affinity allows, in order: the last of a core's, as vLLM takes
    it. A processor whose core the system does not tell is left out."""
    chosen: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        with contextlib.suppress(OSError):
            chosen[(TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")] = cpu
    return sorted(chosen.values())


_INSTRUCTIONS = frozenset(
    [
        "avx2",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "sve",
        "i8mm",
        "bf16",
    ]
)


def flags() -> frozenset[str]:
    """The instructions of this processor that numbers may depend on; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    told = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return _INSTRUCTIONS & frozenset(told.partition(":")[2].split())
