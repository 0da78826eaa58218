"""The machine: processor, memory, GPU, directories and disks, with the limits of the container around us."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import psutil

from pipeline.host import cpu as host_cpu
from pipeline.host.memory import memory_bytes
from pipeline.spec.check import Check

_GIB = 2**30
_SHM = Path("/dev/shm")  # noqa: S108 - looked at, not written to
_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
"""Instruction sets that matrix kernels choose by (x86-64, then Arm)."""
_NETWORK_FILESYSTEMS = (
    "nfs", "cifs", "smb", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "lustre", "ceph", "9p", "glusterfs",
)  # fmt: skip


def cpu() -> Check:
    """Usable cores (affinity and container quota), model, and the instruction sets that matter."""
    model, flags = host_cpu.described()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = host_cpu.quota()
    cores = min(usable, quota) if quota else float(usable)
    found = [flag for flag in _FLAGS if flag in flags]
    detail = ", ".join(filter(None, [f"{cores:g} usable cores", model, " ".join(found)]))
    facts = {"cores": cores, "model": model, "flags": found}
    if flags and not {"avx2", "asimddp"} & flags:
        return Check("cpu", "warn", detail, "no AVX2: prebuilt engines may not run, or run slowly", facts)
    return Check("cpu", "ok", detail, facts=facts)


def memory() -> Check:
    """Memory in all and free now, the container's limit included."""
    seen = psutil.virtual_memory()
    total = memory_bytes()
    free = min(seen.available, total)
    limited = " (limited by the container)" if total < seen.total else ""
    facts = {"total_bytes": total, "available_bytes": free}
    detail = f"{total / _GIB:.1f} GiB{limited}, {free / _GIB:.1f} GiB available"
    if free < 2 * _GIB:
        return Check("memory", "warn", detail, "little memory is free: a language model may not load", facts)
    return Check("memory", "ok", detail, facts=facts)


def shared_memory() -> Check:
    """``/dev/shm``, through which vLLM's processes talk; containers get 64 MiB of it by default."""
    try:
        total = shutil.disk_usage(_SHM).total
    except OSError:
        return Check("shared memory", "warn", "there is no /dev/shm", "vLLM needs it: mount a tmpfs there")
    detail = f"{_SHM} holds {total / _GIB:.2f} GiB"
    if total < _GIB // 4:
        return Check("shared memory", "warn", detail, "vLLM may fail: give the container --shm-size=1g or --ipc=host")
    return Check("shared memory", "ok", detail, facts={"bytes": total})


def directory(name: str, path: Path, *, sqlite: bool) -> Check:
    """Whether files can be made there (or the directory itself, where it is missing), and the room on its disk.

    With ``sqlite`` a network file system is warned of: SQLite's write-ahead log needs shared memory on one machine.
    """
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    facts = {"path": str(path), "exists": path.exists(), "free_bytes": free}
    detail = f"{path}" + ("" if path.exists() else " (made when needed)") + f", {free / _GIB:.1f} GiB free"
    if not there.is_dir():
        return Check(name, "fail", f"{there} is not a directory", f"remove it, or set another {_setting(name)}", facts)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        remedy = f"make {there} writable, or set another {_setting(name)}"
        return Check(name, "fail", f"{there} cannot be written to: {error.strerror}", remedy, facts)
    if free < _GIB // 10:
        return Check(name, "fail", detail, "free some space: the disk is all but full", facts)
    if free < 2 * _GIB:
        return Check(name, "warn", detail, "free some space", facts)
    kind = _filesystem(there)
    if sqlite and kind.startswith(_NETWORK_FILESYSTEMS):
        remedy = "SQLite is not safe on a network file system: put data_dir on a local disk, or use PostgreSQL"
        return Check(name, "warn", f"{detail}, on {kind}", remedy, facts)
    return Check(name, "ok", detail, facts=facts)


def _setting(name: str) -> str:
    return name.split()[0] + "_dir"


def _filesystem(path: Path) -> str:
    """The type of the file system that holds ``path``; ``""`` where it cannot be told."""
    resolved, best, kind = path.resolve(), -1, ""
    for mount in psutil.disk_partitions(all=True):
        point = Path(mount.mountpoint)
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), mount.fstype
    return kind
