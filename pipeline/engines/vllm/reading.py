"""The thread that reads a call's rows: it draws batches, makes prompts, and hands them over as they may wait."""

from __future__ import annotations

import time
from collections.abc import Iterable

from pipeline.engines.base import ResultBatch, RowBatch, RowFailure
from pipeline.engines.vllm.cached_rows import CacheLookup
from pipeline.engines.vllm.pooling import PooledRows
from pipeline.engines.vllm.process.scheduler_stats import Measures
from pipeline.engines.vllm.prompts.prompts import Prompt, Prompts
from pipeline.engines.vllm.requests.exchange import Exchange

CHUNK = 64
"""Most rows that are rendered and tokenized at a time."""


def read_rows(
    exchange: Exchange,
    prompts: Prompts | PooledRows,
    batches: Iterable[RowBatch],
    measures: Measures,
    lookup: CacheLookup | None,
) -> None:
    """Until ``batches`` ends or the call is stopped. An error is raised in the thread that reads the results."""

    def hand_over(made: list[Prompt], failures: list[RowFailure]) -> bool:
        if lookup is None:
            return exchange.offer(made, failures)
        return exchange.offer(lookup.partition_hits(made), failures) and give_found()

    def give_found(*, last: bool = False) -> bool:
        for found in lookup.read_hits(last=last) if lookup is not None else ():
            if not (exchange.give(found) if isinstance(found, ResultBatch) else exchange.offer(found, [])):
                return False
        return True

    try:
        for batch in batches:
            made = prompts.read(batch, CHUNK)
            while True:
                began = time.monotonic()
                chunk = next(made, None)
                measures.render_seconds += time.monotonic() - began
                if chunk is None:
                    break
                if not hand_over(*chunk):
                    return
        if not give_found(last=True):
            return
    except BaseException as error:  # it is raised in the thread that reads the results
        exchange.end_offering(error)
    else:
        exchange.end_offering()
