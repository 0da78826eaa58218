"""ONNX Runtime itself: importing it safely, and sessions as this engine wants them.

Read in ONNX Runtime 1.31 and measured on its CPU build: memory patterns cost memory when shapes vary; weights that are
saved packed are mapped into memory by every session that loads them, and shared between them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.engines.onnx.runtime.options import OnnxOptions, Provider
from pipeline.engines.onnx.runtime.run import QUIET, is_out_of_memory
from pipeline.models import int8_overflow
from storage.errors import EngineMissing, InvalidModel, TransientError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
CGROUP = Path("/sys/fs/cgroup")
KEPT_GRAPH = "optimized.onnx"
KEPT_WEIGHTS = "optimized.weights"
_TELEMETRY = "ORT_DISABLE_TELEMETRY"
TENSORRT = "TensorrtExecutionProvider"
_MORE = ("gpu", "openvino", "migraphx", "rocm", "qnn", "training")
_DISTRIBUTIONS = ("onnxruntime", *(f"onnxruntime-{name}" for name in _MORE))
"""All of them bring the module ``onnxruntime``."""


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph on disk; ``optimized``: as ONNX Runtime saved it, so that nothing is left to optimize."""

    path: Path
    optimized: bool = False


def installed() -> tuple[str, ...]:
    """The ONNX Runtime distributions installed here, as ``name version``."""
    found = []
    for name in _DISTRIBUTIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def import_runtime() -> Any:
    """The module ``onnxruntime``, its telemetry off.

    Raises :class:`~storage.errors.EngineMissing` when it is not installed, installed twice over, broken, or was
    imported with its telemetry on (which starts a thread and a database that a forked child does not survive).
    """
    found = installed()
    if not found:
        raise EngineMissing(
            "ONNX Runtime is not installed; install rowmill[onnx], or rowmill[onnx-gpu] on a GPU machine"
        )
    if len(found) > 1:
        raise EngineMissing(
            f"{' and '.join(found)} are both installed and overwrite each other's files; "
            f"uninstall both, then install rowmill[onnx] or rowmill[onnx-gpu]"
        )
    if "onnxruntime" in sys.modules and os.environ.get(_TELEMETRY) != "1":
        raise EngineMissing(f"onnxruntime was imported with its telemetry on; set {_TELEMETRY}=1 and start again")
    os.environ[_TELEMETRY] = "1"
    try:
        import onnxruntime

        if found[0].startswith("onnxruntime-gpu"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN out of their wheels, where the system has none
    except ImportError as error:
        raise EngineMissing(f"{found[0]} is installed but cannot be imported: {error}") from error
    return onnxruntime


def memory_left(cgroup: Path = CGROUP) -> int:
    """Bytes of memory that can still be had, within the container's limit; its cache of files can be taken back."""
    left = int(psutil.virtual_memory().available)
    for limit, used, cache in (  # of control groups, version 2 and version 1
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):
            most = int((cgroup / limit).read_text(encoding="ascii"))  # "max" is no number
            most -= int((cgroup / used).read_text(encoding="ascii"))
            with suppress(OSError, ValueError):
                stat = (cgroup / used).with_name("memory.stat").read_text(encoding="ascii")
                most += {name: int(n) for name, n in map(str.split, stat.splitlines())}.get(cache, 0)
            left = max(0, min(left, most))
    return left


def gpu_names(driver: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The models of NVIDIA's GPUs here, as the driver names them, sorted."""
    names = []
    for told in driver.glob("*/information"):
        with suppress(OSError):
            names += re.findall(
                r"^Model:\s*(.+?)\s*$", told.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
            )
    return sorted(names)


def processor() -> str:
    """The processor's model and instruction sets."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        lines = re.findall(r"^(model name|flags|Features|CPU part)\s*:\s*(.*)$", text, re.MULTILINE)
        if lines:
            return json.dumps(dict(lines), sort_keys=True)
    return platform.processor() or platform.machine()


def refused_with(runtime: Any) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for inputs or graphs that it cannot run. Its own exceptions share no base."""
    state = runtime.capi.onnxruntime_pybind11_state
    names = (
        "Fail InvalidArgument RuntimeException EPFail NotImplemented InvalidGraph InvalidProtobuf EngineError "
        "NoSuchFile NoModel ModelRequiresCompilation ModelLoadCanceled NotFound"
    )
    own = tuple(getattr(state, name) for name in names.split() if hasattr(state, name))
    return (*own, RuntimeError, ValueError, MemoryError)  # the binding layer raises Python's


def wanted_providers(runtime: Any, options: OnnxOptions) -> list[Provider]:
    available = runtime.get_available_providers()
    if options.providers is None:
        return [(name, {}) for name in (CUDA, CPU) if name in available]
    if unknown := [name for name, _ in options.providers if name not in available]:
        if not options.allow_fallback:
            raise EngineMissing(
                f"this ONNX Runtime has no {', '.join(unknown)}; it has {', '.join(available)}. "
                "GPU providers come with rowmill[onnx-gpu]",
                field="engine_options.providers",
            )
        return [(n, o) for n, o in options.providers if n in available] or [(CPU, {})]
    return list(options.providers)


def with_engine_cache(providers: Sequence[Provider], folder: Path) -> list[Provider]:
    """TensorRT builds its engines for minutes: they are kept in ``folder``, unless the job's options say otherwise."""
    kept = {
        "trt_engine_cache_enable": "True",  # "1" is refused
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }
    if any(name == TENSORRT for name, _ in providers):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    return [(name, {**kept, **settings} if name == TENSORRT else settings) for name, settings in providers]


def open_session(
    runtime: Any,
    file: GraphFile,
    options: OnnxOptions,
    providers: Sequence[Provider],
    threads: int,
    *,
    profile: Path | None = None,
    keep_in: Path | None = None,
) -> Any:
    """A session over the graph. ``profile``: a folder for its trace. ``keep_in``: a folder for the graph as it was
    optimized, ``KEPT_GRAPH``, and its weights as they were packed for this processor, ``KEPT_WEIGHTS``.

    Raises :class:`~storage.errors.InvalidModel` when the runtime refuses the graph, and
    :class:`~storage.errors.TransientError` when memory does not hold it.
    """
    refusals = refused_with(runtime)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile / f"session-{secrets.token_hex(4)}")
    settings.inter_op_num_threads = 1
    settings.enable_mem_pattern = False
    settings.log_severity_level = QUIET
    level = (
        "ORT_DISABLE_ALL"
        if file.optimized or options.graph_optimization_level == "disable"
        else (f"ORT_ENABLE_{options.graph_optimization_level.upper()}")
    )
    settings.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    if keep_in is not None:
        settings.optimized_model_filepath = str(keep_in / KEPT_GRAPH)
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", KEPT_WEIGHTS)
        settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        settings.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in {**int8_overflow.session_config(runtime), **options.session_config}.items():
        settings.add_session_config_entry(key, value)
    for library in options.custom_ops:
        try:
            settings.register_custom_ops_library(library)
        except refusals as error:
            raise InvalidModel(f"the custom operators of {library} cannot be loaded: {error}") from error
    try:
        session = runtime.InferenceSession(str(file.path), settings, providers=list(providers), enable_fallback=0)
    except refusals as error:
        if is_out_of_memory(error):  # here and now; another machine, or this one later, may hold it
            raise TransientError(f"there is not the memory to load {file.path}: {error}") from error
        raise InvalidModel(f"ONNX Runtime cannot load {file.path}: {error}") from error
    session.disable_fallback()  # otherwise a failing GPU run silently moves the session to the CPU
    return session
