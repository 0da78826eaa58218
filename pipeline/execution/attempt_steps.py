"""Notes in the database what an attempt is at, before it does it: whoever finds it dead knows what to make of that."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from pyroaring import BitMap

from pipeline.engines.base import RowBatch
from storage.deaths import Step
from storage.queue import attempts
from storage.records import Claim
from storage.sql.database import Database
from storage.sql.retry import retry_write


class AttemptSteps:
    """Belongs to one attempt, and begins at ``LOADING``, which the claim has noted."""

    def __init__(self, database: Database, claim: Claim) -> None:
        self._database, self._claim = database, claim
        self._lock = threading.Lock()
        self._step = Step.LOADING
        self._isolated = False
        self._inside = BitMap()

    def begin(self, step: Step) -> None:
        """From now on the attempt is at ``step``."""
        with self._lock:
            self._to(step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The attempt waits for another shard of the process."""
        self.begin(Step.WAITING)
        yield
        self.begin(Step.IDLE)

    def handing(self, batches: Iterator[RowBatch], asked: BitMap, *, isolated: bool) -> Iterator[RowBatch]:
        """Hand ``batches`` to an engine. With ``isolated`` every batch is noted, so that only rows inside are blamed:
        those of ``asked``, since the others run only because these need them."""
        self._isolated, self._inside = isolated, BitMap()
        for batch in batches:
            with self._lock:
                if isolated:
                    self._inside |= BitMap(np.asarray(batch.rows, dtype=np.uint32)) & asked
                    self._step = Step.COMPUTING
                    self._note(Step.COMPUTING, self._inside)
                else:
                    self._to(Step.COMPUTING)
            yield batch

    def answered(self, rows: BitMap) -> None:
        """The engine has given the results of these rows, and they are flushed if they are the last ones inside."""
        with self._lock:
            self._inside -= rows
            if self._isolated and not self._inside:
                self._to(Step.IDLE)

    def _to(self, step: Step) -> None:
        if step is not self._step:
            self._step = step
            self._note(step, None)

    def _note(self, step: Step, inside: BitMap | None) -> None:
        """Write a step, and the rows that are isolated inside the engine (``None``: not known)."""
        retry_write(lambda: attempts.note(self._database, self._claim, step, inside))
