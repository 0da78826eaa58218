"""Sessions whose placement is verified, and the lanes that share them.

Read in ONNX Runtime 1.31 and measured on its CPU build: asked for a GPU that is not there, it logs and returns a CPU
session, so ``get_providers()`` and the providers of the single nodes are compared with what was asked for; several
threads may run one session at a time, as fast as a copy for each.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from pipeline.engines.onnx.runtime.graph_cache import Graphs, n_bytes
from pipeline.engines.onnx.runtime.layout import Layout
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.onnx.runtime.ort import (
    CPU,
    CUDA,
    GraphFile,
    import_runtime,
    memory_left,
    open_session,
    refused_with,
    wanted_providers,
    with_engine_cache,
)
from pipeline.engines.onnx.runtime.run import KEPT_BYTES, BoundRunner, CancelScope, SessionRunner, Stopped
from pipeline.host.cpu import available_cores
from storage.errors import Blame, EngineDead, EngineMissing

T = TypeVar("T")

_MOST_SESSIONS = 256
PROFILED_RUNS = 200
"""Pieces of work in a trace."""


class SessionPool:
    """Sessions over one graph and the lanes that drive them, each on a thread. Made in the process that uses it.

    ``placement`` counts the graph's nodes by execution provider, as they were before fusion.
    """

    def __init__(
        self,
        runners: Sequence[SessionRunner],
        providers: tuple[str, ...],
        file: GraphFile,
        layout: Layout,
        *,
        profiling: bool = False,
    ) -> None:
        self._runners = list(runners)
        self._pid = os.getpid()
        self._local = threading.local()
        self.providers = providers
        self.file = file
        self.layout = layout
        self.size = len(self._runners)
        self.placement = _placement(self.session)
        self._profile_lock = threading.Lock()
        self._profiling = profiling
        self._profiled = 0
        free = list(self._runners)

        def take_a_runner() -> None:
            self._local.runner = free.pop()

        self._threads = ThreadPoolExecutor(self.size, "rowmill-onnx", initializer=take_a_runner)

    @classmethod
    def open(
        cls,
        graphs: Graphs,
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
        refusals = refused_with(runtime)
        wanted = with_engine_cache(wanted_providers(runtime, options), graphs.engine_folder)
        on_cpu = all(name == CPU for name, _ in wanted)
        layout = layout or Layout.default(options, available_cores(), on_cpu=on_cpu)
        file = graphs.file()
        first = open_session(runtime, file, options, wanted, layout.threads, profile=profile)
        active = tuple(first.get_providers())
        strict = options.providers is not None and not options.allow_fallback
        missing = [name for name, _ in options.providers or wanted if name not in active]
        if missing and strict:
            raise EngineMissing(
                f"{', '.join(missing)} was asked for, but ONNX Runtime placed the model on {', '.join(active)}: "
                "the device, its driver or its libraries are missing. 'allow_fallback' accepts that",
                field="engine_options.providers",
            )
        if missing:
            notify(f"{', '.join(missing)} does not work here; ONNX Runtime runs on {', '.join(active)}")
            if active == (CPU,) and not on_cpu:  # what was meant for a GPU does not fit
                layout = Layout.default(options, available_cores(), on_cpu=True)
                first = open_session(runtime, file, options, [(CPU, {})], layout.threads, profile=profile)
        elif wanted[0][0] != CPU and (placed := _placement(first)) and wanted[0][0] not in placed:
            said = f"{wanted[0][0]} runs none of the model's {sum(placed.values())} nodes: {_counted(placed)}"
            if strict:
                raise EngineMissing(f"{said}. 'allow_fallback' accepts that", field="engine_options.providers")
            notify(said)
        still = [(name, settings) for name, settings in wanted if name in active]
        rest = [
            open_session(runtime, file, options, still, layout.threads, profile=profile)
            for _ in range(layout.sessions - 1)
        ]
        device = "cuda" if CUDA in active else "cpu"
        device_id = next((int(settings.get("device_id", 0)) for name, settings in still if name == CUDA), 0)
        lanes = [
            SessionRunner(
                runtime,
                session,
                refusals,
                binding=layout.io_binding,
                device=device,
                device_id=device_id,
                seconds=options.row_timeout,
                kept_bytes=KEPT_BYTES // (layout.sessions * layout.lanes),
            )
            for session in [first, *rest]
            for _ in range(layout.lanes)
        ]
        return cls(lanes, active, file, layout, profiling=profile is not None)

    @property
    def session(self) -> Any:
        """One of the sessions, for its signature."""
        return self._runners[0].session

    @property
    def kept_runs(self) -> int:
        """Runs so far that went through kept buffers."""
        return sum(runner.kept_runs for runner in self._runners)

    @property
    def on_cpu(self) -> bool:
        return self.providers == (CPU,)

    def check_process(self) -> None:
        """Raise :class:`~storage.errors.EngineDead` in a forked child: it has the sessions, but not their threads."""
        if os.getpid() != self._pid:
            raise EngineDead("the ONNX Runtime sessions belong to another process; load the engine in this one")

    def submit(self, scope: CancelScope, work: Callable[[BoundRunner], T]) -> Future[T]:
        """Do ``work`` on the next free session's thread."""

        def job() -> T:
            if scope.stopped:
                raise Stopped
            try:
                return work(BoundRunner(self._local.runner, scope))
            finally:
                if self._profiling:
                    self._end_profile(PROFILED_RUNS)

        try:
            return self._threads.submit(job)
        except RuntimeError as error:
            raise EngineDead("the ONNX Runtime engine was closed", blame=Blame.OTHERS) from error

    def _end_profile(self, most: int) -> None:
        """Have the traces written after ``most`` pieces of work: a trace takes some 100 kB for each."""
        with self._profile_lock:
            self._profiled += 1
            if not self._profiling or self._profiled <= most:
                return
            for session in {id(runner.session): runner.session for runner in self._runners}.values():
                session.end_profiling()
            self._profiling = False

    def close(self) -> None:
        """Drop what waits, wait for what runs, free the sessions."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._end_profile(0)
        self._runners.clear()
        self._local = threading.local()


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


def memory_for_copies(file: GraphFile) -> int:
    """How many copies of the model fit into half of the free memory. A copy takes twice its weights while it loads;
    copies whose weights are mapped share them."""
    if file.optimized:
        return _MOST_SESSIONS
    return int(memory_left() / 2 // max(1, 2 * n_bytes(file.path)))
