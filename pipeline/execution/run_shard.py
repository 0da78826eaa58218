"""``run_shard``: the loop that every row of every job goes through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyroaring import BitMap

from pipeline.engines.base import Engine
from pipeline.execution import profiling
from pipeline.execution.assemble_shard import assemble_shard
from pipeline.execution.attempt_context import AttemptContext
from pipeline.execution.engine_calls import EngineCalls
from pipeline.execution.flush import Flusher
from pipeline.execution.poison_search import Mode, search_steps
from pipeline.process.exclusive import LockHandle
from pipeline.requests.engine import answering
from pipeline.spec.result_columns import check_names
from storage import failpoints
from storage.deaths import CAREFUL_AFTER, Step
from storage.queue import attempts


def run_shard(attempt: AttemptContext, engine: Engine) -> None:
    """Read the rows that no earlier attempt has flushed, infer, flush as results come, assemble and commit.

    When the attempt is cancelled, what is finished is flushed and the shard is handed back (interrupted) or ended (its
    job is being wound down). Raises :class:`LeaseLost` when fenced; nothing has been written then.
    """
    runtime, claim, spec = attempt.runtime, attempt.claim, attempt.spec
    attempt.steps.begin(Step.IDLE)
    schema = answering(engine, spec).result_schema(spec)
    check_names(attempt.plan.keep, schema.names, spec.output_prefix)
    with (
        Flusher(attempt, schema) as flusher,
        profiling.recording(runtime.store, claim, engine, wanted=spec.profile) as profile,
        runtime.engine_lock.handle(attempt.cancel, attempt.steps.waiting) as lock,
    ):
        calls = EngineCalls(attempt, profile.engine, flusher)
        _run_rows(attempt, calls, flusher, lock)
        attempt.check_lease()
        whole = flusher.take_whole()
        flusher.drain()
        attempt.steps.begin(Step.FINISHING)
        profiled = profile.finish()
        if calls.pending and attempt.cancel.cancelled:
            attempt.hand_back({**_stats(attempt, profile.engine), **profiled})
            return
        calls.check_complete()
        attempt.check_adapters()  # again: the engine loaded them meanwhile
        output = assemble_shard(attempt, schema, flusher.parts, whole)
        failpoints.hit("commit.assembled")
        stats, computed = {**_stats(attempt, profile.engine), **profiled}, None if whole is None else whole.counts
        attempt.record(attempts.commit, output, stats=stats, computed=computed)
        failpoints.hit("commit.done")


def _run_rows(attempt: AttemptContext, calls: EngineCalls, flusher: Flusher, lock: LockHandle) -> None:
    """Run every row of the claim, until the attempt is cancelled.

    After crashes the rows are run in the steps of a search for the row that kills the engine; each step is flushed
    before the next begins.
    """
    shard, cancel = attempt.claim.shard, attempt.cancel
    searching = shard.n_crash >= CAREFUL_AFTER
    for step in search_steps(attempt.claim.todo, searching=searching, suspect=shard.suspect, futile=shard.n_lost):
        # The lock first: rows that are noted as isolated must have been alone inside the engine.
        if cancel.cancelled or (step.mode is Mode.ISOLATED and not lock.exclusive()):
            return
        match step.mode:
            case Mode.QUARANTINE:
                calls.quarantine(step.rows)
            case Mode.ISOLATED:
                calls.infer(step.rows, cancel, isolated=True)
            case Mode.NORMAL:
                if searching:
                    attempt.record(attempts.end_search)
                lock.release()
                _run_shared(attempt, calls, flusher, lock, step.rows)
        if searching:
            flusher.drain()


def _run_shared(attempt: AttemptContext, calls: EngineCalls, flusher: Flusher, lock: LockHandle, rows: BitMap) -> None:
    """Run ``rows`` while other shards run, and go on after each pause that another shard's search asks for."""
    while (left := rows & calls.pending) and not attempt.cancel.cancelled:
        with lock.shared() as stop:
            calls.infer(left, stop)
            if not stop.cancelled:
                return
            flusher.drain()


def _stats(attempt: AttemptContext, engine: Engine) -> Mapping[str, Any]:
    return {**attempt.measures.summary(), "engine": engine.stats()}
