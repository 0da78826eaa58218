"""This machine's GPUs."""

from __future__ import annotations

import shutil
import subprocess

from pipeline.spec.check import Check


def gpu() -> Check:
    """NVIDIA's GPUs, as ``nvidia-smi`` sees them."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return Check("gpu", "skip", "no NVIDIA driver here (no nvidia-smi)")
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command line
            [command, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=False
        )
    except subprocess.TimeoutExpired:
        return Check("gpu", "fail", "nvidia-smi did not answer within 30 s", "the driver is stuck: see dmesg")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        said = (done.stderr or done.stdout).strip().splitlines()
        detail = said[0] if said else f"nvidia-smi ended with {done.returncode}"
        return Check("gpu", "warn", detail, "the driver is installed but no GPU answers: see 'nvidia-smi'")
    return Check("gpu", "ok", "; ".join(lines), facts={"gpus": lines})


def has_gpu() -> bool:
    """Whether ``nvidia-smi`` lists a GPU."""
    return gpu().status == "ok"
