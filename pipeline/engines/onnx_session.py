"""ONNX Runtime itself: importing it safely, sessions whose placement is verified, lanes that share them.

Read in ONNX Runtime 1.31 and measured on its CPU build: asked for a GPU that is not there, it logs and returns a CPU
session, so ``get_providers()`` and the providers of the single nodes are compared with what was asked for; memory
patterns cost memory when shapes vary; several threads may run one session at a time, as fast as a copy for each.
"""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

from pipeline.engines.onnx_lane import QUIET, Lane, Stopped
from pipeline.engines.onnx_lane import Array as Array
from pipeline.engines.onnx_lane import Call as Call
from pipeline.engines.onnx_lane import Run as Run
from pipeline.engines.onnx_lane import RunFailed as RunFailed
from pipeline.engines.onnx_layout import Layout
from pipeline.engines.onnx_options import OnnxOptions, Provider
from pipeline.models.export import REPORT
from storage.errors import EngineDead, EngineMissing, InvalidModel

T = TypeVar("T")

PROFILED_RUNS = 200
"""Pieces of work in a trace."""
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


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


def available_cores() -> int:
    """Physical cores that this process may use: affinity and the container's CPU quota count."""
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1024)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return max(1, cores)
    return max(1, cores if quota == "max" else min(cores, int(quota) // int(period)))


class SessionPool:
    """Sessions over one graph and the lanes that drive them, each on a thread. Made in the process that uses it.

    ``placement`` counts the graph's nodes by execution provider, as they were before fusion.
    """

    def __init__(
        self, lanes: Sequence[Lane], providers: tuple[str, ...], layout: Layout, *, profiling: bool = False
    ) -> None:
        self._lanes = list(lanes)
        self._pid = os.getpid()
        self._local = threading.local()
        self.providers = providers
        self.layout = layout
        self.size = len(self._lanes)
        self.placement = _placement(self.session)
        self._profile_lock = threading.Lock()
        self._profiling = profiling
        self._profiled = 0
        free = list(self._lanes)

        def take_a_lane() -> None:
            self._local.lane = free.pop()

        self._threads = ThreadPoolExecutor(self.size, "rowmill-onnx", initializer=take_a_lane)

    @classmethod
    def open(
        cls,
        path: Path,
        options: OnnxOptions,
        notify: Callable[[str], None],
        layout: Layout | None = None,
        profile: Path | None = None,
    ) -> Self:
        """Load the graph, in ``layout`` or the one that fits the machine. ``profile``: a folder for traces of the first
        ``PROFILED_RUNS`` pieces of work.

        Raises :class:`~storage.errors.EngineMissing` when a provider that was named is not active or got no node
        (unless ``allow_fallback``), :class:`~storage.errors.InvalidModel` when the runtime refuses the graph.
        """
        runtime = import_runtime()
        refusals = _refusals(runtime)
        wanted = _wanted(runtime, options)
        on_cpu = all(name == CPU for name, _ in wanted)
        layout = layout or Layout.default(options, available_cores(), on_cpu=on_cpu)
        first = _session(runtime, path, options, wanted, refusals, layout.threads, profile)
        active = tuple(first.get_providers())
        strict = options.providers is not None and not options.allow_fallback
        missing = [name for name, _ in wanted if name not in active]
        if missing and strict:
            raise EngineMissing(
                f"{', '.join(missing)} was asked for, but ONNX Runtime placed the model on {', '.join(active)}: "
                "the device, its driver or its libraries are missing. 'allow_fallback' accepts that",
                field="engine_options.providers",
            )
        if missing:
            notify(f"{', '.join(missing)} does not work here; ONNX Runtime runs on {', '.join(active)}")
            if active == (CPU,):  # what was meant for a GPU does not fit
                layout = Layout.default(options, available_cores(), on_cpu=True)
                first = _session(runtime, path, options, [(CPU, {})], refusals, layout.threads, profile)
        elif wanted[0][0] != CPU and (placed := _placement(first)) and wanted[0][0] not in placed:
            said = f"{wanted[0][0]} runs none of the model's {sum(placed.values())} nodes: {_counted(placed)}"
            if strict:
                raise EngineMissing(f"{said}. 'allow_fallback' accepts that", field="engine_options.providers")
            notify(said)
        rest = [
            _session(
                runtime, path, options, [(n, o) for n, o in wanted if n in active], refusals, layout.threads, profile
            )
            for _ in range(layout.sessions - 1)
        ]
        device = "cuda" if CUDA in active else "cpu"
        lanes = [
            Lane(runtime, session, refusals, binding=layout.io_binding, device=device, seconds=options.row_timeout)
            for session in [first, *rest]
            for _ in range(layout.lanes)
        ]
        return cls(lanes, active, layout, profiling=profile is not None)

    def become(self, other: SessionPool) -> None:
        """Take over the sessions and threads of ``other``, which is not used any more; nothing may run on this one."""
        self.close()
        self._lanes, self._threads, self._local = other._lanes, other._threads, other._local
        self.layout, self.size, self.placement = other.layout, other.size, other.placement

    @property
    def session(self) -> Any:
        """One of the sessions, for its signature."""
        return self._lanes[0].session

    @property
    def kept_runs(self) -> int:
        """Runs so far that went through kept buffers."""
        return sum(lane.kept_runs for lane in self._lanes)

    @property
    def on_cpu(self) -> bool:
        return self.providers == (CPU,)

    def check_process(self) -> None:
        """Raise :class:`~storage.errors.EngineDead` in a forked child: it has the sessions, but not their threads."""
        if os.getpid() != self._pid:
            raise EngineDead("the ONNX Runtime sessions belong to another process; load the engine in this one")

    def submit(self, call: Call, work: Callable[[Run], T]) -> Future[T]:
        """Do ``work`` on the next free session's thread."""

        def job() -> T:
            if call.stopped:
                raise Stopped
            try:
                return work(Run(self._local.lane, call))
            finally:
                if self._profiling:
                    self._end_profile(PROFILED_RUNS)

        try:
            return self._threads.submit(job)
        except RuntimeError as error:
            raise EngineDead("the ONNX Runtime engine was closed") from error

    def _end_profile(self, most: int) -> None:
        """Have the traces written after ``most`` pieces of work: a trace takes some 100 kB for each."""
        with self._profile_lock:
            self._profiled += 1
            if not self._profiling or self._profiled <= most:
                return
            for session in {id(lane.session): lane.session for lane in self._lanes}.values():
                session.end_profiling()
            self._profiling = False

    def close(self) -> None:
        """Drop what waits, wait for what runs, free the sessions."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._end_profile(0)
        self._lanes.clear()
        self._local = threading.local()


def _refusals(runtime: Any) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for inputs or graphs that it cannot run. Its own exceptions share no base."""
    state = runtime.capi.onnxruntime_pybind11_state
    names = (
        "Fail InvalidArgument RuntimeException EPFail NotImplemented InvalidGraph InvalidProtobuf EngineError "
        "NoSuchFile NoModel ModelRequiresCompilation ModelLoadCanceled NotFound"
    )
    own = tuple(getattr(state, name) for name in names.split() if hasattr(state, name))
    return (*own, RuntimeError, ValueError, MemoryError)  # the binding layer raises Python's


def _wanted(runtime: Any, options: OnnxOptions) -> list[Provider]:
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


def _session(
    runtime: Any,
    path: Path,
    options: OnnxOptions,
    providers: Sequence[Provider],
    refusals: tuple[type[Exception], ...],
    threads: int,
    profile: Path | None = None,
) -> Any:
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
        if options.graph_optimization_level == "disable"
        else (f"ORT_ENABLE_{options.graph_optimization_level.upper()}")
    )
    settings.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in options.session_config.items():
        settings.add_session_config_entry(key, value)
    for library in options.custom_ops:
        try:
            settings.register_custom_ops_library(library)
        except refusals as error:
            raise InvalidModel(f"the custom operators of {library} cannot be loaded: {error}") from error
    try:
        session = runtime.InferenceSession(str(path), settings, providers=list(providers), enable_fallback=0)
    except refusals as error:
        raise InvalidModel(f"ONNX Runtime cannot load {path}: {error}") from error
    session.disable_fallback()  # otherwise a failing GPU run silently moves the session to the CPU
    return session


def _placement(session: Any) -> dict[str, int]:
    try:
        parts = session.get_provider_graph_assignment_info()
    except (AttributeError, RuntimeError):  # an older ONNX Runtime
        return {}
    counts: Counter[str] = Counter()
    for part in parts:
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts.most_common())


def _counted(placement: dict[str, int]) -> str:
    return ", ".join(f"{count} on {name}" for name, count in placement.items())


def memory_for_copies(path: Path) -> int:
    """How many copies of the model fit into half of the free memory: each takes its weights, twice while it loads."""
    beside = path.parent.iterdir() if (path.parent / REPORT).is_file() else path.parent.glob(f"{path.stem}*data*")
    weights = sum(file.stat().st_size for file in {path, *beside})
    return int(psutil.virtual_memory().available / 2 // max(1, 2 * weights))
