"""Memory of this machine, or of the control group that this process runs in."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil


def memory_bytes() -> int:
    """The memory of this machine, or of the control group that we run in."""
    total = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return total
