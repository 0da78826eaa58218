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
    most = quota()
    return max(1, cores if most is None else min(cores, int(most)))


def quota() -> float | None:
    """Processors that the container may use at a time; ``None``: no limit, or none that the system tells."""
    try:
        most, period = QUOTA.read_text(encoding="ascii").split()
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        return None


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
    return _INSTRUCTIONS & described()[1]


def described() -> tuple[str, frozenset[str]]:
    """The model of this processor and everything that it can do; empty where the system does not tell."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip().lower(), value.strip())
    return found.get("model name", ""), frozenset((found.get("flags") or found.get("features") or "").split())
