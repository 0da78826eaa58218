"""In what order an attempt runs its rows: all of them beside other shards, or in a search for the row that kills.

The search itself is :mod:`pipeline.execution.poison_search`. Here each of its rounds is run.
"""

from __future__ import annotations

from pyroaring import BitMap

from pipeline.execution.attempt_context import AttemptContext
from pipeline.execution.engine_calls import EngineCalls
from pipeline.execution.flush import Flusher
from pipeline.execution.poison_search import Kind, rounds
from pipeline.process.exclusive import Turn
from storage.deaths import CAREFUL_AFTER
from storage.queue import attempts


def run_rounds(attempt: AttemptContext, calls: EngineCalls, flusher: Flusher, turn: Turn) -> None:
    """Run every row of the claim, until the attempt is cancelled.

    After crashes, each round of the search is flushed before the next begins.
    """
    shard, cancel = attempt.claim.shard, attempt.cancel
    searching = shard.n_crash >= CAREFUL_AFTER
    for step in rounds(attempt.claim.todo, searching=searching, suspect=shard.suspect, futile=shard.n_lost):
        # Before anything is noted: the rows that are, were alone.
        if cancel.cancelled or (step.kind is Kind.ALONE and not turn.alone()):
            return
        match step.kind:
            case Kind.POISON:
                calls.give_up(step.rows)
            case Kind.ALONE:
                calls.infer(step.rows, cancel, alone=True)
            case Kind.TOGETHER:
                if searching:
                    attempt.record(attempts.end_search)
                turn.close()
                _run_together(attempt, calls, flusher, turn, step.rows)
        if searching:
            flusher.drain()


def _run_together(attempt: AttemptContext, calls: EngineCalls, flusher: Flusher, turn: Turn, rows: BitMap) -> None:
    """Run ``rows`` beside other shards, and go on after each pause that another shard's search asks for."""
    while (left := rows & calls.pending) and not attempt.cancel.cancelled:
        with turn.together() as stop:
            calls.infer(left, stop)
            if not stop.cancelled:
                return
            flusher.drain()
