"""What loaded models of texts, images and tensors have in common: counters, a first run, the end of a batch."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.engines import pooled_results as results
from pipeline.engines.base import RowBatch
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.onnx.runtime.run import Array, BoundRunner, CancelScope, RunFailed, is_out_of_memory
from pipeline.engines.onnx.runtime.session_pool import SessionPool
from pipeline.engines.onnx.runtime.stream import Indices, PreparedRows
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidModel, TransientError

T = TypeVar("T")


class GraphModel(ABC):
    """A loaded graph that turns rows into result columns. ``counts`` holds what it counted since it was loaded."""

    small_rows = False
    """Whether rows should be read in large batches (see :mod:`pipeline.engines.onnx.tensor.small_rows`)."""

    def __init__(self, pool: SessionPool, options: OnnxOptions) -> None:
        self._pool = pool
        self._options = options
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def result_schema(self, spec: JobSpec) -> pa.Schema:
        """The result columns of a job, as the output contract has them."""

    @abstractmethod
    def prepare(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Iterator[PreparedRows]:
        """Batches for the sessions, window by window, as the stream asks for them."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Statistics for the manifest, the counters included."""

    def close(self) -> None:
        """Wait for the runs in flight, then free the sessions. Safe to call twice."""
        self._pool.close()

    def count(self, **numbers: int) -> None:
        """Add to the counters."""
        with self._lock:
            self.counts.update(numbers)

    def first_run(self, work: Callable[[BoundRunner], T], what: str) -> T:
        """Run the graph before the first row, without a limit of seconds.

        Raises :class:`~storage.errors.InvalidModel` where the graph does not run on ``what``, and
        :class:`~storage.errors.TransientError` where memory does not hold the run.
        """
        try:
            return self._pool.submit(CancelScope(timed=False), work).result()
        except RunFailed as error:
            if is_out_of_memory(error):
                raise TransientError(f"the memory does not hold one run of the model: {error}") from error
            raise InvalidModel(f"the graph does not run on {what}: {error}", field="model") from error


def runs(work: Callable[[], object]) -> bool:
    """Whether a run that worked before still does."""
    try:
        work()
    except RunFailed:
        return False
    return True


def finite_rows(
    parts: Sequence[tuple[Indices, dict[str, Array]]], refused: list[tuple[int, str, str]]
) -> tuple[Indices, dict[str, Array]]:
    """Join the parts of a batch, each items [k] and arrays [k, ...], and leave out the rows that are not finite.

    The array ``finite``, bool [k], says which are; the others are added to ``refused``.
    """
    if not parts:
        return np.empty(0, np.int64), {}
    items = np.concatenate([part for part, _ in parts])
    arrays = {name: np.concatenate([made[name] for _, made in parts]) for name in parts[0][1]}
    finite = arrays.pop("finite")
    refused += [(int(at), *results.NOT_FINITE) for at in items[~finite]]
    return items[finite], {name: array[finite] for name, array in arrays.items()}
