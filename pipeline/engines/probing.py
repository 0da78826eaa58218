"""Tries of what really works here, each in a process of its own: a crash, a hang or a thread left behind stays there.

A probe gives one JSON object on standard output; everything that libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any


def installed(prefix: str) -> dict[str, str]:
    """Installed distributions that are ``prefix`` or begin with ``prefix-``, with their versions."""
    found = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name == prefix or name.startswith(f"{prefix}-"):
            found[name] = distribution.version
    return found


def probe(module: str, arguments: list[str], seconds: float) -> dict[str, Any]:
    """What ``python -m MODULE ARGUMENTS`` answers, which ends with :func:`answer`; ``ok: false`` if it crashes or hangs
    for longer than ``seconds``."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(  # noqa: S603 - a module of an engine
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"no answer within {seconds:.0f} s"}
    finally:
        # The probe leads a process group of its own: whatever a library started in it ends with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    try:
        result: dict[str, Any] = json.loads(out)
    except ValueError:
        lines = err.decode(errors="replace").strip().splitlines()
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        return {"ok": False, "error": f"ended with {how}" + (f": {lines[-1]}" if lines else "")}
    return result


def answer(probes: Mapping[str, Callable[..., dict[str, Any]]], arguments: list[str]) -> int:
    """Run the probe that the first of ``arguments`` names; its result, or the error's text, is printed as JSON."""
    result_fd = os.dup(1)
    os.dup2(2, 1)
    name, *rest = arguments
    try:
        result = probes[name](*rest)
    except Exception as error:  # whatever a native library's Python side raises is the finding
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    os.write(result_fd, json.dumps(result).encode())
    return 0
