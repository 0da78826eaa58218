"""What a graph is fed for given rows: recorded on the way of every job, for calibrating a quantized copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.engines.onnx.runtime.run import Array, CancelScope
from pipeline.engines.onnx.runtime.session_pool import SessionPool
from pipeline.engines.onnx.runtime.stream import PreparedRows

Feed = dict[str, Array]


class _Recorder:
    """A lane's run that keeps what it is fed."""

    def __init__(self, run: Any, seen: list[Feed]) -> None:
        self._run = run
        self._seen = seen

    def __call__(self, feed: Mapping[str, Array]) -> Any:
        self._keep(feed)
        return self._run(feed)

    def one(self, feed: Mapping[str, Array], output: str, shape: tuple[int, ...] | None) -> Any:
        self._keep(feed)
        return self._run.one(feed, output, shape)

    def _keep(self, feed: Mapping[str, Array]) -> None:
        self._seen.append({name: array.copy() for name, array in feed.items()})


def feeds(windows: Iterable[PreparedRows], pool: SessionPool) -> Iterator[Feed]:
    """The feeds of every batch, in order. The batches are computed, too: some are fed by what came before."""
    scope = CancelScope()
    for window in windows:
        for batch in window.batches:
            seen: list[Feed] = []
            work: Any = batch
            pool.submit(scope, lambda run, work=work, seen=seen: work(_Recorder(run, seen))).result()  # type: ignore[misc]
            yield from seen
