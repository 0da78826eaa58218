"""A job from the request to its shards, and the two ways to interfere: cancel and retry."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import uuid_utils

from pipeline import inputs, output_owner, permissions, planning, regrouping, routing
from pipeline.engines import registry
from pipeline.engines.base import Cancellation
from pipeline.flusher import patiently
from pipeline.job_spec import NOT_PART_OF_THE_WORK, JobSpec, parse
from pipeline.models import adapters
from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from pipeline.outputs import chunks_are_gone
from pipeline.plan_record import PlanRecord
from pipeline.profiling import Profiled
from pipeline.result_columns import known_names
from pipeline.runtime import Runtime
from storage import (
    failpoints,
    finalizing,
    input_rows,
    jobs,
    locations,
    output_probe,
    planners,
    retries,
    schedules,
)
from storage.errors import (
    CommitUnknown,
    Conflict,
    IllegalTransition,
    InputChanged,
    Interrupted,
    InvalidInput,
    InvalidJob,
    QuotaExceeded,
    RowmillError,
    TransientError,
)
from storage.fires import Taken
from storage.records import FireKey, Job, ShardPlan
from storage.states import TERMINAL_JOB, JobState

ERROR_COLUMN = "error"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request that was found to be workable, with what its plan needs."""

    record: PlanRecord
    found: inputs.Inputs
    regrouped: regrouping.Regrouped | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would be. ``n_bytes``: uncompressed, of all columns; ``columns``: what its task reads."""

    files: int
    rows: int
    n_bytes: int
    shards: int
    engine: str
    columns: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "columns": list(self.columns)}


def estimate(runtime: Runtime, fields: dict[str, Any]) -> Estimate:
    """Read the input's footers as planning would, and store nothing. Raises :class:`InvalidJob` and its kin."""
    spec = absolute(parse(fields))
    model = resolve(spec.model, runtime.settings.cache_dir)
    engine = routing.choose(spec.task, spec.engine, model)
    work = locations.work_dir(spec.output, f"estimate-{secrets.token_hex(8)}")
    try:
        found = inputs.discover(runtime.store, spec, work)
        columns = registry.check(engine, spec, model, found.schema)
        _refuse_unreadable(found, columns, _kept(spec, tuple(found.schema.names)))
    finally:
        runtime.store.delete_tree(work)
    found = found.narrowed(limit=spec.limit, sample=spec.sample)
    return Estimate(
        files=sum(1 for _ in found.files),
        rows=found.rows,
        n_bytes=sum(n_bytes for file in found.files for _, n_bytes in file.row_groups),
        shards=sum(1 for _ in planning.plan(found.files, shard_rows=spec.shard_rows, shard_bytes=spec.shard_bytes)),
        engine=engine,
        columns=tuple(columns),
    )


def submit_job(
    runtime: Runtime, fields: dict[str, Any], *, resume: bool = False, plan: bool = False, fire: FireKey | None = None
) -> Job:
    """Validate a request and queue it as ``validating``. With ``resume``, the job that does the same work instead: the
    live one, or the completed one whose output is there and whose input and model are as they were.

    With ``plan`` the input is read first and the job comes back planned. With ``fire``, that fire of a schedule is
    marked as submitted with it; raises :class:`IllegalTransition` when it is not pending any more. Raises
    :class:`InvalidJob` and its kin, naming the field and the reason. Nothing is stored then.
    """
    spec = absolute(parse(fields))
    model, engine = model_and_engine(runtime, spec)
    live = jobs.live_on_output(runtime.database, spec.output)
    if live is not None and resume:
        if live.spec_hash == spec.work_hash():
            if spec.overwrite:
                output_owner.acquire(runtime, live, overwrite=True)
            return live
        raise Conflict(
            f"job {live.id} ({live.state}) already writes there, with other settings ({_differences(live, spec)}); "
            f"give the same ones to resume it, choose another output, or 'rowmill job cancel {live.id}'",
            field="output",
        )
    if live is None and resume and not spec.overwrite and (done := _done_before(runtime, spec, model)) is not None:
        runtime.notify(f"job {done.id} has done this already; --overwrite (overwrite=True) does it again")
        return done
    known = jobs.has_key(runtime.database, spec.tenant, spec.idempotency_key)
    if live is None and not known:
        output_owner.refuse_taken(runtime, spec.output, overwrite=spec.overwrite)
    job_id = str(uuid_utils.uuid7())
    try:
        prepared = _prepare(runtime, job_id, spec, engine, model) if plan and live is None and not known else None
        failpoints.hit("plan.prepared")
        job = jobs.insert(
            runtime.database,
            job_id=job_id,
            tenant=spec.tenant,
            priority=spec.priority,
            queue=engine,
            engine=engine,
            engine_key=registry.engine_key(engine, model, spec.task, spec.engine_options),
            spec=spec.model_dump(mode="json"),
            spec_hash=spec.work_hash(),
            idempotency_key=spec.idempotency_key,
            output_uri=spec.output,
            max_failed_rows=spec.max_failed_rows,
            window_seconds=spec.window_seconds,
            actor=runtime.actor,
            new_tenant=runtime.settings.unknown_tenants == "create",
            fire=fire,
        )
    except BaseException:
        with suppress(RowmillError):  # what cannot be deleted may be the very reason
            runtime.store.delete_tree(locations.work_dir(spec.output, job_id))
        raise
    if job.id != job_id:
        runtime.store.delete_tree(locations.work_dir(spec.output, job_id))
        return job
    failpoints.hit("submit.inserted")
    _own_output(runtime, job, spec)
    # Regrouping reads all of the input: that is for whoever runs the job, who begins again after a crash.
    if prepared is None or _limits_if_regrouped(runtime, spec, prepared.found) is not None:
        return job
    return _store_plan(runtime, job, spec, prepared)


def _own_output(runtime: Runtime, job: Job, spec: JobSpec) -> None:
    """After the job was stored: an owner that its database does not know would stand in everybody's way."""
    try:
        output_owner.acquire(runtime, job, overwrite=spec.overwrite)
    except RowmillError as error:
        if runtime.settings.broker_url is not None and (error.elsewhere or isinstance(error, TransientError)):
            runtime.notify(f"the output is left to a worker to take, since it cannot be reached from here: {error}")
            return
        if isinstance(error, InvalidJob):
            with suppress(IllegalTransition):  # a planner has refused it already
                _refuse(runtime, job, spec, error)
        raise


def _done_before(runtime: Runtime, spec: JobSpec, model: Model) -> Job | None:
    store, job = runtime.store, jobs.newest_on_output(runtime.database, spec.output)
    if job is None or job.state is not JobState.COMPLETED or job.n_dead or job.spec_hash != spec.work_hash():
        return None
    plan = PlanRecord.from_json(job.plan)
    if plan.model_digest != model.digest or not store.exists(locations.success(spec.output)):
        return None
    found = adapters.digests(spec.adapters, runtime.settings.cache_dir)
    if not all(plan.has_adapter(name, digest) for name, digest in found.items()):
        return None
    sources = finalizing.all_sources(runtime.database, job.id)
    if plan.converted or not inputs.unchanged(store, spec, sources):
        return None
    return job


def model_and_engine(runtime: Runtime, spec: JobSpec) -> tuple[Model, str]:
    """The model, and the name of the engine that will run it; loads neither. Raises :class:`InvalidJob` and its kin."""
    allowed = permissions.granted(runtime.settings)
    permissions.check_adapters(spec, allowed)
    model = resolve(spec.model, runtime.settings.cache_dir)
    engine = routing.choose(spec.task, spec.engine, model)
    kind = registry.engine_class(engine)
    registry.check_permissions(engine, spec.engine_options, allowed)
    if spec.profile and not issubclass(kind, Profiled):
        raise InvalidJob(f"engine {engine!r} writes no traces; 'onnx' does", field="profile")
    if spec.request_timeout is not None and not getattr(kind, "times_out_requests", False):
        remedy = "set its option row_timeout (--set row_timeout=SECONDS)" if engine == "onnx" else "leave it out"
        raise InvalidJob(f"engine {engine!r} aborts no single rows; {remedy}", field="request_timeout")
    return model, engine


def absolute(spec: JobSpec) -> JobSpec:
    """The spec with every local path made absolute, so that it means the same in any working directory."""
    model = spec.model
    if Path(model).exists():
        model = str(Path(model).resolve())
    return spec.model_copy(
        update={
            "input": tuple(locations.normalize(uri) for uri in spec.input),
            "output": locations.normalize(spec.output),
            "model": model,
            "adapters": {name: str(adapters.directory(name, folder)) for name, folder in spec.adapters.items()},
        }
    )


def _differences(live: Job, spec: JobSpec) -> str:
    ours = spec.model_dump(mode="json")
    names = [name for name, value in ours.items() if name not in NOT_PART_OF_THE_WORK and live.spec.get(name) != value]
    return ", ".join(names) or "an older version"


def plan_job(runtime: Runtime, job: Job, interrupt: Cancellation | None = None, *, owner: str | None = None) -> Job:
    """Read the input's footers, check that the work can be done, and store the shards.

    The job of an incremental schedule takes only the files that no completed fire has taken as they are now; which
    these are is fixed here. Raises :class:`InvalidJob` after recording the job as failed with that reason. Where rows
    are to be regrouped, raises :class:`LeaseLost` when another planner is at it, and :class:`Interrupted` when
    ``interrupt`` fires: the job can then be planned again. ``owner`` is who holds the planner's lease already.
    """
    spec = JobSpec(**job.spec)
    schedule_id = schedules.incremental_of(runtime.database, job.id)
    done = None if schedule_id is None else partial(schedules.processed, runtime.database, schedule_id)
    try:
        output_owner.check(runtime, job, over_rows=spec.overwrite)
        model = resolve(spec.model, runtime.settings.cache_dir)
        prepared = _prepare(runtime, job.id, spec, job.engine, model, done)
        if (limits := _limits_if_regrouped(runtime, spec, prepared.found)) is not None:
            prepared = _regrouped(runtime, job, spec, prepared, limits, interrupt, owner)
    except InvalidJob as error:
        _refuse(runtime, job, spec, error)
        raise
    taken = None if schedule_id is None else Taken(schedule_id, tuple(prepared.found.originals))
    return _store_plan(runtime, job, spec, prepared, taken)


def _prepare(
    runtime: Runtime, job_id: str, spec: JobSpec, engine: str, model: Model, done: inputs.Processed | None = None
) -> _Prepared:
    # Another worker may plan the same job, or run it already: nothing here is deleted but what was made here.
    work = locations.work_dir(spec.output, job_id)
    found = inputs.discover(runtime.store, spec, work, runtime.notify, done)
    columns = registry.check(engine, spec, model, found.schema)
    keep = _kept(spec, tuple(found.schema.names))
    _refuse_unreadable(found, columns, keep)
    # An output that cannot hold the rows is refused now, not after the engine was loaded and rows were computed.
    output_probe.require(runtime.store, spec.output, work)
    converted = any(source.uri.startswith(work) for source in found.sources)
    with_adapters = adapters.digests(spec.adapters, runtime.settings.cache_dir)
    record = PlanRecord(
        found.schema,
        tuple(columns),
        keep,
        model.digest,
        model.architectures,
        converted,
        adapters=with_adapters,
        input_rows=found.rows,
    )
    return _Prepared(record, found.narrowed(limit=spec.limit, sample=spec.sample))


def _limits_if_regrouped(runtime: Runtime, spec: JobSpec, found: inputs.Inputs) -> regrouping.Limits | None:
    """The limits for copying the job's rows into another order, where that is wanted."""
    settings = runtime.settings
    limits = regrouping.Limits(
        cluster_rows=settings.order_rows,
        n_bytes=settings.order_bytes // 4,
        batch_rows=settings.read_batch_rows,
        batch_bytes=settings.read_batch_bytes,
    )
    return limits if regrouping.wanted(spec, found.rows, limits) else None


def _regrouped(
    runtime: Runtime,
    job: Job,
    spec: JobSpec,
    prepared: _Prepared,
    limits: regrouping.Limits,
    interrupt: Cancellation | None,
    owner: str | None,
) -> _Prepared:
    record, found, settings = prepared.record, prepared.found, runtime.settings
    # Of its own, not the worker's: two threads of one worker may plan.
    owner = owner or f"{runtime.worker.id}#{secrets.token_hex(4)}"
    lease, renew_at = settings.lease_seconds, 0.0

    def going_on() -> None:
        nonlocal renew_at
        if interrupt is not None and interrupt.cancelled:
            raise Interrupted(f"job {job.id} was interrupted while its rows were put in order; nothing was run yet")
        if time.monotonic() >= renew_at:
            patiently(lambda: planners.hold(runtime.database, job.id, owner=owner, lease_seconds=lease))
            renew_at = time.monotonic() + lease / 3

    going_on()
    runtime.notify("putting rows whose prompts begin alike into the same shards")
    columns = [name for name in record.schema.names if name in {*record.columns, *record.keep}]
    work = locations.work_dir(spec.output, job.id)
    try:
        made = regrouping.regroup(runtime.store, spec, found, columns, work, limits, going_on)
    except BaseException as error:
        with suppress(TransientError, CommitUnknown):
            planners.let_go(runtime.database, [owner])
        if isinstance(error, InputChanged):
            raise InvalidInput(str(error), field="input") from error
        if isinstance(error, (pa.ArrowException, ValueError, TypeError)) and not isinstance(error, RowmillError):
            what = f"its rows could not be put in another order: {error}; use order 'auto'"
            raise InvalidInput(what, field="order") from error
        raise
    return replace(prepared, record=replace(record, part_rows=made.part_rows), regrouped=made)


def _store_plan(runtime: Runtime, job: Job, spec: JobSpec, prepared: _Prepared, taken: Taken | None = None) -> Job:
    made = prepared.regrouped
    shards: Iterable[ShardPlan] = (
        planning.plan(prepared.found.files, shard_rows=spec.shard_rows, shard_bytes=spec.shard_bytes)
        if made is None
        else made.shards
    )
    try:
        return jobs.set_planned(
            runtime.database,
            job.id,
            plan=prepared.record.to_json(),
            sources=chain(prepared.found.sources, () if made is None else made.chunks),
            shards=shards,
            actor=runtime.actor,
            taken=taken,
        )
    except QuotaExceeded as error:
        _refuse(runtime, job, spec, error)
        raise


def refuse_job(runtime: Runtime, job: Job, error: RowmillError) -> None:
    """End a job that waits for its plan, for this reason. Raises :class:`IllegalTransition` when it waits no more."""
    _refuse(runtime, job, JobSpec(**job.spec), error)


def _refuse(runtime: Runtime, job: Job, spec: JobSpec, error: RowmillError) -> None:
    output_owner.release(runtime, job)
    jobs.refuse(runtime.database, job.id, str(error), actor=runtime.actor)
    with suppress(InvalidJob):  # a right to delete that is missing may be the very reason
        runtime.store.delete_tree(locations.work_dir(spec.output, job.id))


def _kept(spec: JobSpec, names: tuple[str, ...]) -> tuple[str, ...]:
    missing = [name for name in spec.keep_columns or () if name not in names]
    if missing:
        raise InvalidInput(
            f"the input has no column {', '.join(map(repr, missing))}; it has {', '.join(names)}", field="keep_columns"
        )
    keep = names if spec.keep_columns is None else spec.keep_columns
    clash = [name for name in keep if name in {ERROR_COLUMN, *known_names(spec)}]
    if clash:
        leave_out = "leave them out: name the columns to copy in keep_columns (--keep)"
        # No prefix is put before 'error'.
        advice = leave_out if ERROR_COLUMN in clash else f"set output_prefix (--output-prefix), or {leave_out}"
        raise InvalidJob(
            f"the input columns {', '.join(map(repr, clash))} have the names of result columns; {advice}",
            field="keep_columns" if ERROR_COLUMN in clash else "output_prefix",
        )
    return tuple(keep)


def _refuse_unreadable(found: inputs.Inputs, columns: Iterable[str], keep: Iterable[str]) -> None:
    """Raise :class:`InvalidInput` for a column that is read or kept and that nobody can read."""
    for name, where in found.unreadable.items():
        if name in columns:
            raise InvalidInput(f"column {name!r} cannot be read in {where}; decrypt or mend the file", field="input")
        if name in keep:
            what = f"column {name!r} cannot be read in {where}"
            advice = "leave it out: name the columns to copy in keep_columns (--keep), or decrypt or mend the file"
            raise InvalidInput(f"{what}; {advice}", field="keep_columns")


def cancel_job(runtime: Runtime, job_id: str) -> Job:
    """Begin to wind the job down; its finished rows will be published as partial."""
    return jobs.request_stop(runtime.database, job_id, "cancelled", actor=runtime.actor)


def retry_job(runtime: Runtime, job_id: str, *, failed_only: bool = True) -> Job:
    """Queue an ended job again: its unfinished shards, and its failed rows (or all rows)."""
    job = jobs.get(runtime.database, job_id)
    if job.state in TERMINAL_JOB and chunks_are_gone(runtime.store, input_rows.chunks(runtime.database, job_id)):
        raise Conflict(
            f"what job {job_id} was made of has been deleted (its rows lay in another order, in files of its own); "
            "submit it again with --overwrite (overwrite=True)"
        )
    spec = JobSpec(**job.spec)
    if job.state in TERMINAL_JOB:
        output_owner.refuse_retry(runtime, job, overwrite=spec.overwrite)
    reopened = retries.reopen(
        runtime.database, job_id, failed_only=failed_only, window_seconds=spec.window_seconds, actor=runtime.actor
    )
    output_owner.check(runtime, reopened, over_rows=True)
    return reopened
