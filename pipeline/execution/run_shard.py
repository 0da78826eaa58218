"""``run_shard``: the loop that every row of every job goes through."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from pipeline.engines.base import Engine
from pipeline.execution import profiling
from pipeline.execution.assemble_shard import assemble_shard
from pipeline.execution.attempt_context import AttemptContext
from pipeline.execution.engine_calls import EngineCalls
from pipeline.execution.flush import Flusher
from pipeline.execution.rounds import run_rounds
from pipeline.requests.engine import answering
from pipeline.spec.result_columns import check_names
from storage import failpoints
from storage.deaths import Step
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
        closing(runtime.isolation.turn(attempt.cancel, attempt.steps.waiting)) as turn,
    ):
        calls = EngineCalls(attempt, profile.engine, flusher)
        run_rounds(attempt, calls, flusher, turn)
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


def _stats(attempt: AttemptContext, engine: Engine) -> Mapping[str, Any]:
    return {**attempt.measures.summary(), "engine": engine.stats()}
