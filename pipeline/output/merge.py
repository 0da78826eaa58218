"""Several files that are each sorted by row, merged into one sequence of rows with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyroaring import BitMap

Rows = npt.NDArray[np.int64]


@dataclass(slots=True)
class Run:
    """One file: ``batches`` yields its (row numbers, columns), rising. Of them, only those in ``owned`` count.

    Nothing is drawn from ``batches`` before the merge reaches the first owned row, and it is closed after the last.
    """

    uri: str
    owned: BitMap
    batches: Iterator[tuple[Rows, pa.RecordBatch]]
    rows: Rows = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    columns: pa.RecordBatch | None = None

    def load(self) -> bool:
        """Make sure that there is a row in hand; false when no owned row is left."""
        while not len(self.rows):
            item = next(self.batches, None)
            if item is None:
                return False
            self.rows, self.columns = self._owned_of(*item)
        return True

    def upto(self, last: int) -> tuple[Rows, pa.RecordBatch] | None:
        """Take the rows in hand up to ``last``."""
        count = int(np.searchsorted(self.rows, last, side="right"))
        if not count or self.columns is None:
            return None
        taken = self.rows[:count], self.columns.slice(0, count)
        self.rows, self.columns = self.rows[count:], self.columns.slice(count)
        return taken

    def _owned_of(self, rows: Rows, columns: pa.RecordBatch) -> tuple[Rows, pa.RecordBatch]:
        if not len(rows):
            return rows, columns
        low, high = int(rows[0]), int(rows[-1]) + 1
        mine = np.array((self.owned & BitMap(range(low, high))).to_array(), dtype=np.int64)
        at = np.searchsorted(rows, mine)
        if len(at) == len(rows):
            return rows, columns
        return mine, columns.take(at)


def merge(runs: Sequence[Run], schema: pa.Schema) -> Iterator[tuple[Rows, pa.Table]]:
    """All owned rows in order: (rising row numbers, their columns as a table of ``schema``).

    The runs must own disjoint sets of rows. Each step ends where the first of the batches in hand does, so that at most
    one batch of each open run is in memory.
    """
    waiting = sorted((run for run in runs if run.owned), key=lambda run: run.owned.min(), reverse=True)
    open_runs: list[Run] = []
    while waiting or open_runs:
        open_runs = [run for run in open_runs if run.load()]
        heads = [int(run.rows[0]) for run in open_runs]
        first = min([*heads, *(run.owned.min() for run in waiting[-1:])], default=None)
        if first is None:
            return
        if waiting and waiting[-1].owned.min() <= first:
            open_runs.append(waiting.pop())
            continue
        last = min(int(run.rows[-1]) for run in open_runs)
        if waiting:
            last = min(last, waiting[-1].owned.min() - 1)
        taken = [item for item in (run.upto(last) for run in open_runs) if item is not None]
        rows = np.concatenate([rows for rows, _ in taken])
        table = pa.Table.from_batches([columns for _, columns in taken], schema=schema)
        if len(taken) > 1:
            order = np.argsort(rows, kind="stable")
            rows, table = rows[order], table.take(order)
        yield rows, table
