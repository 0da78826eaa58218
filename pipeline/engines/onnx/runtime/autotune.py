"""Which layout is fastest here: measured in seconds on a sample of the first window of rows, then remembered.

A busy machine makes any layout look slow, so a rival that led at first has to win every one of some pairs of turns, and
by ``MARGIN`` in the median. Why so, and what was measured: docs/adr/0017.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.engines.onnx.runtime import layout as onnx_layout
from pipeline.engines.onnx.runtime.graph_cache import Graphs
from pipeline.engines.onnx.runtime.layout import Layout
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.onnx.runtime.ort import gpu_names, memory_total, processor
from pipeline.engines.onnx.runtime.run import Call, Stopped
from pipeline.engines.onnx.runtime.session_pool import SessionPool, memory_for_copies
from pipeline.engines.onnx.runtime.stream import Pack, settle
from pipeline.host.cpu import available_cores
from storage.errors import Blame, EngineDead

log = logging.getLogger(__name__)

MARGIN = 1.05
"""How many times as fast a rival must be."""
SAMPLE_SECONDS = 0.5
"""About how long one turn of the first layout takes."""
SLOW_SECONDS = 4.0
"""A model whose single batch takes longer is not tuned, unless a measurement was asked for by name."""
LIMIT_SECONDS = 15.0
"""After this long no further turn is taken, unless a measurement was asked for by name."""
LEAST_ROWS = 1024
"""Distinct rows in a window that a measurement can be made on."""
WORTH_SECONDS = 120.0
"""A measurement is worth its seconds once the engine has worked so long."""
MEASURED = 2
"""Raised when what was measured before holds no longer."""
_PAIRS = 3
"""Turns of the leader and the champion, in alternation."""

Sample = Callable[[int, int], list[Pack]]
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

    def told(self) -> dict[str, Any]:
        """For people: ``chosen`` and ``trials``, layouts in words."""
        trials = [
            {"layout": str(t.layout), "rows_per_second": t.rows_per_second, "ratio": t.ratio, "chosen": t.chosen}
            for t in self.trials
        ]
        return {"chosen": str(self.layout), "trials": trials}

    def to_json(self) -> dict[str, Any]:
        trials = [
            {**trial.layout.to_json(), "rows_per_second": trial.rows_per_second, "ratio": trial.ratio}
            for trial in self.trials
        ]
        return {"layout": self.layout.to_json(), "trials": trials}


class Bench:
    """Measures layouts of one graph; ``pool`` is the one in use, with which the first layout is measured.

    ``patient``: measure slow models too.

    Raises, when ``call`` is stopped, :class:`~pipeline.engines.onnx.runtime.run.Stopped`.
    """

    def __init__(
        self,
        graphs: Graphs,
        options: OnnxOptions,
        pool: SessionPool,
        sample: Sample,
        call: Call,
        *,
        patient: bool = False,
    ) -> None:
        self._graphs, self._options, self._pool = graphs, options, pool
        self._sample, self._call, self._patient = sample, call, patient
        self._began = time.monotonic()
        self.reason = "nothing to measure"
        """Why nothing was measured."""
        self._every = 1
        self._n_rows = 0
        self.trials: list[Trial] = []

    def tune(self, *, text: bool) -> Tuned | None:
        """The fastest layout, or ``None`` when nothing was measured."""
        cores, on_cpu, options = available_cores(), self._pool.on_cpu, self._options
        best = self._pool.layout
        if not self._choose_sample(best):
            return None
        copies = memory_for_copies(self._pool.file)
        questions: list[Callable[[Layout], Iterable[Layout]]] = [
            lambda best: onnx_layout.rivals(best, options, cores, copies, on_cpu=on_cpu)
        ]
        if text:
            questions += [
                lambda best: onnx_layout.budgets(best, options, on_cpu=on_cpu),
                lambda best: onnx_layout.bindings(best, options),
                self._fusions,
            ]
        for rivals in questions:
            if not self._late():
                best = self._contest(best, rivals(best))
        if not self.trials:
            return None
        return Tuned(best, tuple(self.trials))

    def _late(self) -> bool:
        return not self._patient and time.monotonic() - self._began >= LIMIT_SECONDS

    def _fusions(self, best: Layout) -> Iterable[Layout]:
        """Making the other form takes seconds, so it is made when everything else is known."""
        rivals = list(onnx_layout.fusions(best, self._options))
        if rivals and not self._graphs.can_fuse(patient=self._patient, stopped=lambda: self._call.stopped):
            return []
        return rivals

    def _choose_sample(self, layout: Layout) -> bool:
        whole = self._sample(layout.token_budget, 1)
        if not whole:
            return False
        # The middle one stands for all; the first run of a shape may be slow.
        middle = [whole[len(whole) // 2]]
        self._seconds(self._pool, middle)
        one = self._seconds(self._pool, middle)
        if one > SLOW_SECONDS and not self._patient:
            self.reason = "too slow to measure"
            return False
        wanted = max(2 * self._pool.size, int(SAMPLE_SECONDS / max(one, 1e-6)) * self._pool.size)
        self._every = max(1, len(whole) // wanted)
        return True

    def _contest(self, champion: Layout, rivals: Iterable[Layout]) -> Layout:
        """The champion, or the fastest rival that beats it clearly."""
        challengers = list(rivals)
        if not challengers:
            return champion
        with self._pools(champion, challengers) as pools:
            seconds = {champion: self._turn(pools[champion], champion, warm=True)}
            for layout in [layout for layout in pools if layout != champion]:
                taken = None if self._late() else self._attempt(pools, layout, warm=True)
                if taken is not None:
                    seconds[layout] = taken
            rates = {layout: self._n_rows / taken for layout, taken in seconds.items()}
            ratios = {layout: seconds[champion] / taken for layout, taken in seconds.items()}
            fastest = min(seconds, key=lambda layout: seconds[layout])
            if fastest != champion:
                won = self._duel(pools, champion, fastest)
                if won:
                    ratios[fastest] = median(won)
                if len(won) < _PAIRS or min(won) < 1.0 or ratios[fastest] < MARGIN:
                    fastest = champion
        for layout, rate in rates.items():
            self.trials.append(Trial(layout, round(rate, 2), round(ratios[layout], 3), layout == fastest))
        return fastest

    def _duel(self, pools: dict[Layout, SessionPool], champion: Layout, rival: Layout) -> list[float]:
        """How many times as fast the rival is, by pairs of turns; ends with the first that it loses, or fails in."""
        won: list[float] = []
        while len(won) < _PAIRS and min(won, default=1.0) >= 1.0 and not self._late():
            if len(won) % 2:
                theirs, ours = self._attempt(pools, rival), self._turn(pools[champion], champion, warm=False)
            else:
                ours, theirs = self._turn(pools[champion], champion, warm=False), self._attempt(pools, rival)
            if theirs is None:
                break
            won.append(ours / theirs)
        return won

    def _attempt(self, pools: dict[Layout, SessionPool], layout: Layout, *, warm: bool = False) -> float | None:
        """A rival's turn, in seconds; ``None`` when it fails: a layout that does not work here is out."""
        try:
            return self._turn(pools[layout], layout, warm=warm)
        except (Stopped, EngineDead):
            raise
        except Exception as error:
            log.info("layout %s is out: %s", layout, error)
            failed = pools.pop(layout)
            if failed is not self._pool:
                failed.close()
            return None

    def _turn(self, pool: SessionPool, layout: Layout, *, warm: bool) -> float:
        packs = self._sample(layout.token_budget, self._every)
        if warm:
            self._seconds(pool, packs[: pool.size])
        return self._seconds(pool, packs)

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
                    log.info("layout %s is out: %s", layout, error)
            yield opened
        finally:
            for pool in opened.values():
                if pool is not self._pool:
                    pool.close()

    def _seconds(self, pool: SessionPool, packs: Sequence[Pack]) -> float:
        began = time.perf_counter()
        futures: list[Future[Any]] = [pool.submit(self._call, pack) for pack in packs]
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
    parts += [round(memory_total() / 2**30), gpu_names()]
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
            json.dump(tuned.to_json(), file, indent=1)
        Path(temporary).replace(path)


def _path(cache_dir: Path, name: str) -> Path:
    return cache_dir / "onnx-layouts" / f"{name}.json"
