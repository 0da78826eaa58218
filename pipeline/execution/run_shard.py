"""``run_shard``: the loop that every row of every job goes through."""

from __future__ import annotations

import logging
import random
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

import numpy as np
import pyarrow as pa
from pyroaring import BitMap

from pipeline.engines import registry
from pipeline.engines.base import Cancellation, Engine, ResultBatch, RowBatch, RowFailure
from pipeline.engines.pool import LeaseCancelled
from pipeline.execution import profiling
from pipeline.execution.attempt_steps import AttemptSteps
from pipeline.execution.backoff import backoff
from pipeline.execution.completeness import Ledger
from pipeline.execution.flush import Flusher
from pipeline.execution.part_repair import forget_damaged
from pipeline.execution.poison_search import Kind, rounds
from pipeline.execution.prefetch import ReadAhead
from pipeline.models import adapters
from pipeline.models.resolve import resolve
from pipeline.output import assemble, owner
from pipeline.output.destination import published
from pipeline.planning.plan import PlanRecord
from pipeline.process.heartbeat import JOB_STOPPING, LEASE_LOST, LeaseKeeper
from pipeline.process.metrics import Measures
from pipeline.process.runtime import Runtime
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec, stored
from pipeline.spec.result_columns import check_names
from storage import failpoints, locations
from storage.deaths import CAREFUL_AFTER, Step
from storage.errors import (
    Blame,
    CommitUnknown,
    CorruptFile,
    EngineDead,
    InputChanged,
    InvalidJob,
    InvalidModel,
    LeaseLost,
    RowmillError,
    TransientError,
)
from storage.parquet import parquet
from storage.queue import attempts
from storage.records import OUTPUT_SEQ, Claim, PartFile
from storage.redaction import redact_text
from storage.sql.retry import retry_write

log = logging.getLogger(__name__)


class _DiedRunning(EngineDead):
    """The engine died under rows (not while it was loaded): one of them may be the cause."""


class _DiedUnderOthers(EngineDead):
    """The engine died while no row of this shard was in it, or was closed on purpose."""


def execute(
    runtime: Runtime, claim: Claim, keeper: LeaseKeeper, interrupt: Cancellation, *, others: bool = False
) -> bool:
    """Take a claimed shard to the end of its attempt, whatever happens: committed, failed, released or cancelled.

    Nothing is raised: every outcome is in the database. ``others``: there may be other workers, so what may be wrong
    with this one alone (``RowmillError.elsewhere``) fails the attempt, and the job only when the shard's budget is
    spent. Returns whether this worker is fit for such a shard, as far as this attempt can say.
    """
    fit = True
    measured: dict[str, Any] = {}
    failpoints.hit("claim.taken")
    cancel = keeper.hold(claim)
    forget = interrupt.on_cancel(lambda: cancel.cancel(interrupt.reason or "interrupted"))
    try:
        _attempt(runtime, claim, cancel, measured)
    except LeaseLost as lost:
        log.warning("%s", lost)
        with suppress(TransientError, CommitUnknown):
            attempts.supersede(runtime.database, claim)
    except _DiedUnderOthers as error:
        why = str(error)
        log.warning("shard %s goes back, and is not counted as failed: %s", claim.shard.id, why)
        _report(lambda: attempts.release(runtime.database, claim, stats=measured, error=why))
    except (InputChanged, InvalidJob) as error:
        fit, reason = not error.elsewhere, str(error)
        spent = claim.shard.n_fail + 1 >= runtime.settings.max_failures
        if fit or spent or not others:
            _report(lambda: attempts.fail_job(runtime.database, claim, reason, stats=measured))
        else:
            _fail(runtime, claim, reason, measured)
    except BaseException as error:
        # Of any kind: SystemExit of a model's code, or a panic of a Rust library, would end this thread in silence.
        fit = not getattr(error, "elsewhere", False)
        # Not swallowed: it is the attempt's recorded error, and costs one failure of the shard's budget.
        if not isinstance(error, RowmillError):
            log.exception("attempt %d of shard %s failed", claim.attempt_no, claim.shard.id)
        text = str(error) if isinstance(error, RowmillError) else _last_line(error)
        if interrupt.cancelled:
            # While everything around it ends, anything may break; what does on its own account will do so again.
            _report(lambda: attempts.release(runtime.database, claim, stats=measured, error=text))
        else:
            _fail(runtime, claim, text, measured, crash=isinstance(error, _DiedRunning))
    finally:
        forget()
        keeper.drop(claim)
    return fit


def _fail(runtime: Runtime, claim: Claim, text: str, stats: Mapping[str, Any], *, crash: bool = False) -> None:
    # A search for a poison row is not a pile-up on something busy: it goes on at once.
    searching = crash and claim.shard.n_crash + 1 >= CAREFUL_AFTER
    delay = 0.0 if searching else backoff(claim.shard.n_fail + 1, random.random())  # noqa: S311 - jitter
    settings = runtime.settings
    limits = {"max_failures": settings.max_failures, "max_losses": settings.max_losses}
    _report(lambda: attempts.fail(runtime.database, claim, text, delay=delay, crash=crash, stats=stats, **limits))


def _report(write: Any) -> None:
    """Record how an attempt ended. If that cannot be done, the lease runs out and the reaper records it as lost."""
    try:
        retry_write(write)
    except (LeaseLost, CommitUnknown, TransientError) as error:
        log.warning("the end of an attempt could not be recorded: %s", error)


def _last_line(error: BaseException) -> str:
    return redact_text(traceback.format_exception_only(error)[-1].strip())


def _attempt(runtime: Runtime, claim: Claim, cancel: Cancellation, measured: dict[str, Any]) -> None:
    spec = stored(claim.job.spec)
    plan = PlanRecord.from_json(claim.job.plan)
    owner.check(runtime, claim.job)
    model = resolve(spec.model, runtime.settings.cache_dir)
    if model.digest != plan.model_digest:
        raise InvalidModel(f"{spec.model} changed after the job was planned; submit a new job", field="model")
    _check_adapters(runtime, spec, plan)
    spec = registry.settled(claim.job.engine, spec, model, plan.schema)
    began = time.monotonic()
    try:
        with runtime.engines.lease(claim.job.engine, model, spec.task, spec.engine_options, cancel) as engine:
            loading = time.monotonic() - began
            try:
                run_shard(runtime, claim, engine, spec, plan, cancel, loading, measured)
            except EngineDead as error:
                runtime.engines.discard(engine)
                match error.blame:
                    case Blame.OWN:
                        raise _DiedRunning(str(error)) from error
                    case Blame.OTHERS:
                        raise _DiedUnderOthers(str(error)) from error
                raise
    except LeaseCancelled:
        _stopped(runtime, claim, cancel, {})


def _check_adapters(runtime: Runtime, spec: JobSpec, plan: PlanRecord) -> None:
    """Raise :class:`InvalidModel` for an adapter that is not the one that the job was planned with."""
    for name, found in adapters.digests(spec.adapters, runtime.settings.cache_dir).items():
        if not plan.has_adapter(name, found):
            raise InvalidModel("it changed after the job was planned; submit a new job", field=f"adapters.{name}")


def _stopped(runtime: Runtime, claim: Claim, cancel: Cancellation, stats: Mapping[str, Any]) -> None:
    """The attempt was told to stop, and what it had finished is flushed."""
    if cancel.reason == LEASE_LOST:
        raise LeaseLost(f"attempt {claim.attempt_no} no longer holds shard {claim.shard.id}")
    end = attempts.cancel if cancel.reason == JOB_STOPPING else attempts.release
    retry_write(lambda: end(runtime.database, claim, stats=stats))


def run_shard(
    runtime: Runtime,
    claim: Claim,
    engine: Engine,
    spec: JobSpec,
    plan: PlanRecord,
    cancel: Cancellation,
    load_seconds: float = 0.0,
    broken_off: dict[str, Any] | None = None,
) -> None:
    """Read the rows that no earlier attempt has flushed, infer, flush as results come, assemble and commit.

    When ``cancel`` fires, what is finished is flushed and the shard is handed back (interrupted) or ended (its job is
    being wound down). Raises :class:`LeaseLost` when fenced; nothing has been written then. ``load_seconds`` is how
    long the attempt waited for the engine to be ready; ``broken_off`` gets what had been measured when it raises.
    """
    measures = Measures(load_seconds)
    job, shard = claim.job, claim.shard
    directory = locations.attempt_dir(
        job.output_uri, job.id, shard.idx, shard.gen, claim.attempt_no, secrets.token_hex(4)
    )
    steps = AttemptSteps(lambda step, alone: retry_write(lambda: attempts.note(runtime.database, claim, step, alone)))
    steps.begin(Step.IDLE)
    schema = engine.result_schema(spec)
    check_names(plan.keep, schema.names, spec.output_prefix)
    ledger = Ledger(claim.todo)
    searching = shard.n_crash >= CAREFUL_AFTER
    with (
        _told_when_broken_off(broken_off, measures, flusher := Flusher(runtime, claim, directory, schema)),
        flusher,
        profiling.recording(runtime.store, claim, engine, wanted=spec.profile) as profile,
        closing(runtime.isolation.turn(cancel, steps.waiting)) as place,
    ):

        def take(results: Iterator[ResultBatch], asked: BitMap) -> None:
            # Closed here and now when a flush fails: what it has inside the engine must not go on.
            with closing(results):  # type: ignore[type-var]
                for batch in measures.waiting(results):
                    measures.add(batch.measured)
                    if not len(batch.rows) and not batch.failures:
                        continue
                    rows, failed = ledger.settle(batch)
                    flusher.add(batch, rows, failed)
                    if not asked & ledger.pending:
                        flusher.drain()  # before the engine goes on: if it dies now, no row was inside
                    steps.answered(rows)

        def infer(rows: BitMap, stop: Cancellation, *, alone: bool = False) -> None:
            def handed(batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
                return steps.handing(measures.reading(batches), alone=alone)

            take(_infer(runtime, claim, profile.engine, spec, plan, rows, stop, handed), rows)

        for turn in rounds(claim.todo, searching=searching, suspect=shard.suspect, futile=shard.n_lost):
            # Before anything is noted: the rows that are, were alone.
            if cancel.cancelled or (turn.kind is Kind.ALONE and not place.alone()):
                break
            if turn.kind is Kind.POISON:
                take(_poisoned(turn.rows), turn.rows)
            elif turn.kind is Kind.ALONE:
                infer(turn.rows, cancel, alone=True)
            else:
                if searching:
                    retry_write(lambda: attempts.end_search(runtime.database, claim))
                place.close()
                while (left := turn.rows & ledger.pending) and not cancel.cancelled:
                    with place.together() as stop:
                        infer(left, stop)
                        if not stop.cancelled:
                            break
                        flusher.drain()
            if searching:
                flusher.drain()
        if cancel.reason == LEASE_LOST:
            raise LeaseLost(f"attempt {claim.attempt_no} no longer holds shard {shard.id}")
        flusher.drain()
        steps.begin(Step.FINISHING)
        profiled = profile.finish()
        stats = {**_stats(profile.engine, measures, flusher), **profiled}
        if ledger.pending and cancel.cancelled:
            _stopped(runtime, claim, cancel, stats)
            return
        ledger.close()
        _check_adapters(runtime, spec, plan)  # again: the engine loaded them meanwhile
        parts = (*claim.parts, *flusher.parts)
        try:
            with measures.spent("write_seconds"):
                output = _assemble(runtime, claim, plan, spec, schema, directory, parts)
        except CorruptFile as error:
            lost = forget_damaged(runtime, claim, parts)
            if not lost:
                raise
            raise CorruptFile(f"{error}; {lost} flushed rows have to be computed again") from error
        failpoints.hit("commit.assembled")
        stats = {**_stats(profile.engine, measures, flusher), **profiled}
        retry_write(lambda: attempts.commit(runtime.database, claim, output, stats=stats))
        failpoints.hit("commit.done")


@contextmanager
def _told_when_broken_off(stats: dict[str, Any] | None, measures: Measures, flusher: Flusher) -> Iterator[None]:
    """What was flushed stays, so what it took is counted."""
    try:
        yield
    except BaseException:
        if stats is not None:
            stats["measured"] = measures.total(flusher.rows_flushed, flusher.seconds)
        raise


def _infer(
    runtime: Runtime,
    claim: Claim,
    engine: Engine,
    spec: JobSpec,
    plan: PlanRecord,
    rows: BitMap,
    cancel: Cancellation,
    handed: Callable[[Iterator[RowBatch]], Iterator[RowBatch]],
) -> Iterator[ResultBatch]:
    if not rows:
        return
    with (
        closing(_rows(runtime, claim, plan, rows)) as batches,
        closing(engine.infer(spec, handed(batches), cancel)) as results,  # type: ignore[type-var]
    ):
        yield from results


def _poisoned(rows: BitMap) -> Iterator[ResultBatch]:
    message = "each time this row was run, the engine or its worker process died"
    failures = tuple(RowFailure(row, RowErrorCode.POISON_ROW, message) for row in rows)
    yield ResultBatch(np.array([], dtype=np.int64), None, failures)


def _rows(runtime: Runtime, claim: Claim, plan: PlanRecord, only: BitMap) -> ReadAhead:
    settings = runtime.settings
    batches = parquet.read(
        runtime.store,
        claim.sources,
        claim.shard.slices,
        schema=plan.schema,
        columns=plan.columns,
        only=only,
        batch_rows=settings.read_batch_rows,
        batch_bytes=settings.read_batch_bytes,
    )
    return ReadAhead((RowBatch(rows, columns) for rows, columns in batches), settings.read_ahead_bytes)


def _assemble(
    runtime: Runtime,
    claim: Claim,
    plan: PlanRecord,
    spec: JobSpec,
    schema: pa.Schema,
    directory: str,
    parts: tuple[PartFile, ...],
) -> PartFile:
    shard, job_output = claim.shard, claim.job.output_uri
    assembled = assemble.assemble(
        runtime.store,
        f"{directory}/output.parquet",
        job_schema=plan.schema,
        keep=plan.keep,
        result_schema=schema,
        prefix=spec.output_prefix,
        sources=claim.sources,
        slices=shard.slices,
        row_n=shard.row_n,
        parts=parts,
        base=claim.base if plan.part_rows else published(runtime.store, job_output, shard.idx, claim.base),
        partial=False,
        batch_rows=runtime.settings.read_batch_rows,
        batch_bytes=runtime.settings.read_batch_bytes,
    )
    runtime.store.verify(assembled.written)
    return PartFile(
        attempt_no=claim.attempt_no,
        seq=OUTPUT_SEQ,
        uri=assembled.written.uri,
        n_bytes=assembled.written.n_bytes,
        sha256=assembled.written.sha256,
        etag=assembled.written.etag,
        rows=BitMap(range(shard.row_n)),
        failed=assembled.failed,
    )


def _stats(engine: Engine, measures: Measures, flusher: Flusher) -> Mapping[str, Any]:
    seconds = measures.seconds
    return {
        "seconds": round(seconds, 3),
        "flush_seconds": round(flusher.seconds, 3),
        "rows_per_second": round(flusher.rows_flushed / seconds, 2) if seconds > 0 else 0.0,
        "measured": measures.total(flusher.rows_flushed, flusher.seconds),
        "engine": engine.stats(),
    }
