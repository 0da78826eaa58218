"""ONNX Runtime itself: importing it safely, sessions whose placement is verified, runs that can be stopped.

Read in ONNX Runtime 1.31 and measured on its CPU build: asked for a GPU that is not there, it logs and returns a CPU
session, so ``get_providers()`` is compared with what was asked for; ``RunOptions.terminate`` ends a run within 0.3 s
and latches, so every run gets options of its own; memory patterns cost memory when shapes vary.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import psutil

from pipeline.engines import onnx_narrow
from pipeline.engines.onnx_options import OnnxOptions, Provider
from pipeline.models.export import REPORT
from storage.errors import EngineDead, EngineMissing, InvalidModel

Array = npt.NDArray[Any]
T = TypeVar("T")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
_QUIET = 4  # only what ends the process: a refused row is reported by us, not on stderr


class Stopped(Exception):
    """The call that this run belongs to was cancelled or closed."""


class RunFailed(Exception):
    """ONNX Runtime refused these inputs. The message is the runtime's."""


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


class Call:
    """Everything that one ``infer`` has running, so that it can be stopped from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Any] = set()
        self.stopped = False

    def stop(self) -> None:
        """End the runs in flight and refuse further ones."""
        with self._lock:
            self.stopped = True
            for options in self._running:
                options.terminate = True

    def enter(self, options: Any) -> None:
        with self._lock:
            if self.stopped:
                raise Stopped
            self._running.add(options)

    def leave(self, options: Any) -> None:
        with self._lock:
            self._running.discard(options)


class Lane:
    """One session, driven by one thread at a time."""

    def __init__(self, runtime: Any, session: Any, refusals: tuple[type[Exception], ...]) -> None:
        self._runtime = runtime
        self._refusals = refusals
        self.session = session
        self._outputs = [value.name for value in session.get_outputs()]
        # ONNX Runtime binds no strings.
        self._bindable = all("string" not in v.type for v in [*session.get_inputs(), *session.get_outputs()])

    def run(self, feed: Mapping[str, Array], call: Call) -> list[Array]:
        """Outputs in graph order. Raises :class:`Stopped`, or :class:`RunFailed` when the runtime refuses the feed."""
        options = self._runtime.RunOptions()
        options.log_severity_level = _QUIET
        call.enter(options)
        try:
            if not self._bindable:
                outputs = self.session.run(None, dict(feed), options)
            else:
                binding = self.session.io_binding()
                for name, array in feed.items():
                    onnx_narrow.bind(binding, name, array)
                for name in self._outputs:
                    binding.bind_output(name, "cpu")
                self.session.run_with_iobinding(binding, options)
                outputs = [onnx_narrow.array_of(value) for value in binding.get_outputs()]
        except self._refusals as error:
            if call.stopped:
                raise Stopped from None
            raise RunFailed(str(error)) from error
        finally:
            call.leave(options)
        return [np.asarray(output) for output in outputs]


class Run:
    """A lane lent to one piece of work of one call."""

    def __init__(self, lane: Lane, call: Call) -> None:
        self._lane = lane
        self._call = call

    def __call__(self, feed: Mapping[str, Array]) -> list[Array]:
        return self._lane.run(feed, self._call)


class SessionPool:
    """Sessions over one graph, each driven by its own thread. Made in the process that uses it."""

    def __init__(self, lanes: Sequence[Lane], providers: tuple[str, ...]) -> None:
        self._lanes = list(lanes)
        self._pid = os.getpid()
        self._local = threading.local()
        self.providers = providers
        self.size = len(self._lanes)
        free = list(self._lanes)

        def take_a_lane() -> None:
            self._local.lane = free.pop()

        self._threads = ThreadPoolExecutor(self.size, "rowmill-onnx", initializer=take_a_lane)

    @classmethod
    def open(cls, path: Path, options: OnnxOptions, notify: Callable[[str], None]) -> Self:
        """Load the graph. Raises :class:`~storage.errors.EngineMissing` when a provider that was named is not active
        (unless ``allow_fallback``), :class:`~storage.errors.InvalidModel` when the runtime refuses the graph."""
        runtime = import_runtime()
        refusals = _refusals(runtime)
        wanted = _wanted(runtime, options)
        first = _session(runtime, path, options, wanted, refusals)
        active = tuple(first.get_providers())
        missing = [name for name, _ in wanted if name not in active]
        if missing and options.providers is not None and not options.allow_fallback:
            raise EngineMissing(
                f"{', '.join(missing)} was asked for, but ONNX Runtime placed the model on {', '.join(active)}: "
                "the device, its driver or its libraries are missing. 'allow_fallback' accepts that",
                field="engine_options.providers",
            )
        if missing:
            notify(f"{', '.join(missing)} does not work here; ONNX Runtime runs on {', '.join(active)}")
        size = options.sessions or _default_sessions(path, options, active)
        rest = [
            _session(runtime, path, options, [(n, o) for n, o in wanted if n in active], refusals)
            for _ in range(size - 1)
        ]
        return cls([Lane(runtime, session, refusals) for session in [first, *rest]], active)

    @property
    def session(self) -> Any:
        """One of the sessions, for its signature."""
        return self._lanes[0].session

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
            return work(Run(self._local.lane, call))

        try:
            return self._threads.submit(job)
        except RuntimeError as error:
            raise EngineDead("the ONNX Runtime engine was closed") from error

    def close(self) -> None:
        """Drop what waits, wait for what runs, free the sessions."""
        self._threads.shutdown(wait=True, cancel_futures=True)
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
) -> Any:
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.enable_mem_pattern = False
    settings.log_severity_level = _QUIET
    level = (
        "ORT_DISABLE_ALL"
        if options.graph_optimization_level == "disable"
        else (f"ORT_ENABLE_{options.graph_optimization_level.upper()}")
    )
    settings.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
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


def _default_sessions(path: Path, options: OnnxOptions, active: tuple[str, ...]) -> int:
    if active != (CPU,):
        return 1
    # Every session holds its own copy of the weights, twice while it loads: stay within half of the free memory.
    beside = path.parent.iterdir() if (path.parent / REPORT).is_file() else path.parent.glob(f"{path.stem}*data*")
    weights = sum(file.stat().st_size for file in {path, *beside})
    fitting = int(psutil.virtual_memory().available / 2 // max(1, 2 * weights))
    return max(1, min(available_cores() // options.threads, fitting))
