"""The file that a model's sessions are opened from: its graph, optimized once and kept.

ONNX Runtime can save a graph after optimizing it, with the weights packed for the processor; later sessions map that
file. Measured (ONNX Runtime 1.31, two cores): 0.3 to 0.5 times the time to load, bit-equal
results at the same speed, and the weights in memory once for all sessions and processes of a machine (docs/adr/0023).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.onnx.runtime.ort import CPU, KEPT_GRAPH, GraphFile, open_session, processor, wanted_providers
from pipeline.models import cache_entry, external_data
from pipeline.models.model import Model
from storage.errors import InvalidModel, TransientError

LEAST_BYTES = 32 * 2**20
"""Graphs smaller than this, weights included, load in a moment, and are not kept."""
LAYOUT = 2
_REPORT = "kept.json"


def n_bytes(graph: Path) -> int:
    """The size of a graph with the weights beside it, in bytes."""
    beside: tuple[str, ...] = ()
    with suppress(OSError, ValueError):
        beside = external_data.locations(graph)
    return sum(path.stat().st_size for path in (graph, *(graph.parent / name for name in beside)) if path.is_file())


class Graphs:
    """One model's graph, and the file that stands for it on this machine."""

    def __init__(
        self,
        runtime: Any,
        graph: Path,
        model: Model,
        options: OnnxOptions,
        cache_dir: Path,
    ) -> None:
        self.raw = graph
        self.n_bytes = n_bytes(graph)
        self._runtime = runtime
        self._options = options
        self._cache_dir = cache_dir
        inside = model.path is not None and graph.is_relative_to(model.path)
        # An exported graph lies in a folder whose name says what made it.
        where = str(graph.relative_to(model.path)) if inside and model.path else f"{graph.parent.name}/{graph.name}"
        self._identity = f"{model.digest} {where} {self.n_bytes}"
        self._lock = threading.Lock()
        self._file: GraphFile | None = None

    @property
    def engine_folder(self) -> Path:
        """Where a provider may keep what it builds of this graph."""
        key = hashlib.sha256(json.dumps([self._identity, str(self._runtime.__version__)]).encode()).hexdigest()[:32]
        return self._cache_dir / "onnx-engines" / key

    def file(self) -> GraphFile:
        """The file to open; it is made now, where one is worth keeping."""
        with self._lock:
            if self._file is None:
                self._file = self._kept()
            return self._file

    def _kept(self) -> GraphFile:
        """The graph as ONNX Runtime saved it; the graph itself where nothing is gained or nothing can be saved."""
        raw, options = GraphFile(self.raw), self._options
        providers = wanted_providers(self._runtime, options)
        on_cpu = all(name == CPU for name, _ in providers)
        # What other providers make of a graph is theirs to keep; a library of operators may change beneath us.
        if not options.keep_optimized or not on_cpu or options.custom_ops or self.n_bytes < LEAST_BYTES:
            return raw
        how = [options.graph_optimization_level, sorted(options.session_config.items()), [p for _, p in providers]]
        parts = [self._identity, False, str(self._runtime.__version__), processor(), how, LAYOUT]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        final = self._cache_dir / "onnx-optimized" / key

        def make(work: Path) -> None:
            open_session(self._runtime, raw, options, providers, 1, keep_in=work)
            sizes = {file.name: file.stat().st_size for file in work.iterdir()}
            (work / _REPORT).write_text(json.dumps({"sizes": sizes}), encoding="utf-8")

        try:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            if not _whole(final):
                # Packed weights are up to twice as large; a cache must not fill a disk that others use.
                if shutil.disk_usage(self._cache_dir).free < 4 * self.n_bytes:
                    return raw
                if (final / _REPORT).is_file() and not _whole(final):  # and not made by another process meanwhile
                    (final / _REPORT).unlink()
                cache_entry.made_once(final, _REPORT, make)
        except (
            OSError,
            InvalidModel,
            TransientError,
        ):  # the graph itself will tell what is wrong with it, if anything is
            return raw
        return GraphFile(final / KEPT_GRAPH, optimized=True)


def _whole(entry: Path) -> bool:
    """A mapped file that was cut off would end the process that reads past its end."""
    try:
        sizes = json.loads((entry / _REPORT).read_text(encoding="utf-8"))["sizes"]
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False
