"""Which layout is fastest here: measured by ``rowmill model benchmark`` on a sample of rows, then remembered for jobs.

A busy machine makes any layout look slow, so all take turns, and a rival has to win every turn against the layout in
use, and by ``MARGIN`` in the median. Why so, and what was measured: docs/adr/0017 and 0035.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.engines.onnx.runtime import layout as onnx_layout
from pipeline.engines.onnx.runtime.graph_cache import Graphs
from pipeline.engines.onnx.runtime.layout import Layout
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.onnx.runtime.ort import gpu_names, processor
from pipeline.engines.onnx.runtime.run import CancelScope, Stopped
from pipeline.engines.onnx.runtime.session_pool import SessionPool, memory_for_copies
from pipeline.engines.onnx.runtime.stream import Batch, settle
from pipeline.host.cpu import available_cores
from pipeline.host.memory import memory_bytes
from storage.errors import Blame, EngineDead
from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)

MARGIN = 1.05
"""How many times as fast a rival must be."""
SAMPLE_SECONDS = 0.5
"""About how long one turn of the first layout takes."""
TURNS = 3
"""Of each layout, after one that warms it up."""
MEASURED = 3
"""Raised when what was measured before holds no longer."""

Sample = Callable[[int, int], list[Batch]]
"""Packs of every ``n``-th row of a window at a token budget: ``sample(budget, n)``."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One layout as measured: ``ratio`` is its speed against the layout that it was to replace."""

    layout: Layout
    rows_per_second: float
    ratio: float
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest layout, and everything that was measured on the way."""

    layout: Layout
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """For people: ``chosen`` and ``trials``, layouts in words."""
        return {
            "chosen": str(self.layout),
            "trials": [{**asdict(trial), "layout": str(trial.layout)} for trial in self.trials],
        }


class Bench:
    """Measures layouts of one graph; ``pool`` is the one in use, with which the first layout is measured.

    Raises, when ``scope`` is stopped, :class:`~pipeline.engines.onnx.runtime.run.Stopped`.
    """

    def __init__(
        self, graphs: Graphs, options: OnnxOptions, pool: SessionPool, sample: Sample, scope: CancelScope
    ) -> None:
        self._graphs, self._options, self._pool = graphs, options, pool
        self._sample, self._scope = sample, scope
        self._every = 1
        self._n_rows = 0
        self.trials: list[Trial] = []

    def tune(self, *, text: bool) -> Tuned | None:
        """The fastest layout, or ``None`` when nothing was measured."""
        options, on_cpu = self._options, self._pool.on_cpu
        best = self._pool.layout
        if not self._choose_sample(best):
            return None
        copies = memory_for_copies(self._pool.file)
        best = self._contest(best, onnx_layout.rivals(best, options, available_cores(), copies, on_cpu=on_cpu))
        if text:
            best = self._contest(best, onnx_layout.budgets(best, options, on_cpu=on_cpu))
        return Tuned(best, tuple(self.trials)) if self.trials else None

    def _choose_sample(self, layout: Layout) -> bool:
        whole = self._sample(layout.token_budget, 1)
        if not whole:
            return False
        # The middle one stands for all; the first run of a shape may be slow.
        middle = [whole[len(whole) // 2]]
        self._seconds(self._pool, middle)
        one = self._seconds(self._pool, middle)
        wanted = max(2 * self._pool.size, int(SAMPLE_SECONDS / max(one, 1e-6)) * self._pool.size)
        self._every = max(1, len(whole) // wanted)
        return True

    def _contest(self, champion: Layout, rivals: Iterable[Layout]) -> Layout:
        """The champion, or the fastest rival that beats it clearly."""
        challengers = list(rivals)
        if not challengers:
            return champion
        with self._pools(champion, challengers) as pools:
            seconds: dict[Layout, list[float]] = {layout: [] for layout in pools}
            for turn in range(TURNS + 1):
                # Back and forth: what changes on the machine meanwhile favours nobody.
                for layout in list(pools)[:: -1 if turn % 2 else 1]:
                    taken = self._attempt(pools, layout, champion)
                    if taken is not None and turn:
                        seconds[layout].append(taken)
            won = {
                layout: [theirs / ours for theirs, ours in zip(seconds[champion], seconds[layout], strict=True)]
                for layout in pools
            }
            ratios = {layout: median(turns) for layout, turns in won.items()}
            clear = [layout for layout in pools if min(won[layout]) >= 1.0 and ratios[layout] >= MARGIN]
            fastest = max(clear, key=lambda layout: ratios[layout], default=champion)
        for layout, ratio in ratios.items():
            rate = self._n_rows / median(seconds[layout])
            self.trials.append(Trial(layout, round(rate, 2), round(ratio, 3), layout == fastest))
        return fastest

    def _attempt(self, pools: dict[Layout, SessionPool], layout: Layout, champion: Layout) -> float | None:
        """A turn, in seconds; ``None`` when a rival's fails: a layout that does not work here is out."""
        try:
            return self._seconds(pools[layout], self._sample(layout.token_budget, self._every))
        except (Stopped, EngineDead):
            raise
        except Exception as error:
            if layout == champion:
                raise
            log.info("layout %s is out: %s", layout, error, action=Action.ENGINE_LAYOUT_REJECTED)
            failed = pools.pop(layout)
            if failed is not self._pool:
                failed.close()
            return None

    @contextmanager
    def _pools(self, champion: Layout, rivals: Sequence[Layout]) -> Iterator[dict[Layout, SessionPool]]:
        """Pools in these layouts, as far as they open: a rival may ask for more memory than there is."""
        opened: dict[Layout, SessionPool] = {}
        try:
            for layout in [champion, *rivals]:
                if layout == self._pool.layout:
                    opened[layout] = self._pool
                    continue
                try:
                    opened[layout] = SessionPool.open(self._graphs, self._options, lambda message: None, layout)
                except Exception as error:
                    if layout == champion:
                        raise
                    log.info("layout %s is out: %s", layout, error, action=Action.ENGINE_LAYOUT_REJECTED)
            yield opened
        finally:
            for pool in opened.values():
                if pool is not self._pool:
                    pool.close()

    def _seconds(self, pool: SessionPool, batches: Sequence[Batch]) -> float:
        began = time.perf_counter()
        futures: list[Future[Any]] = [pool.submit(self._scope, batch) for batch in batches]
        try:
            results = [future.result() for future in futures]
        except CancelledError:
            raise EngineDead("the ONNX Runtime engine was closed while it was measured", blame=Blame.OTHERS) from None
        finally:
            settle(futures)
        self._n_rows = sum(len(result.rows) for result in results)
        return time.perf_counter() - began


def key(digest: str, graph: Path, task: str, version: str, providers: Sequence[str], options: OnnxOptions) -> str:
    """Names what was measured: the model on this ONNX Runtime, its providers, the machine, the options set."""
    chosen = options.model_dump(mode="json", exclude={"window_rows", "autotune", "allow_fallback"})
    parts = [MEASURED, digest, graph.name, task, version, *providers, processor(), available_cores(), chosen]
    parts += [round(memory_bytes() / 2**30), gpu_names()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(cache_dir: Path, name: str) -> Layout | None:
    """The layout measured before; ``None`` when there is none, or the file is damaged (then it is measured again)."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Layout.from_json(json.loads(_path(cache_dir, name).read_text(encoding="utf-8"))["layout"])
    return None


def write(cache_dir: Path, name: str, tuned: Tuned) -> None:
    """Remember it, for every process on this machine. A cache that cannot be written is no error."""
    path = _path(cache_dir, name)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"layout": tuned.layout.to_json(), **tuned.to_json()}, file, indent=1)
        Path(temporary).replace(path)


def _path(cache_dir: Path, name: str) -> Path:
    return cache_dir / "onnx-layouts" / f"{name}.json"
