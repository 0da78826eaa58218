"""A job from the request to its shards, and the two ways to interfere: cancel and retry."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
import uuid_utils

from pipeline.engines import registry
from pipeline.engines.base import Cancellation
from pipeline.inputs import discovery
from pipeline.jobs import lost_chunks, preflight
from pipeline.models import adapters
from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from pipeline.output import owner as output_owner
from pipeline.output.destination import chunks_are_gone
from pipeline.planning import lease, repartition, sequences, shard_plan
from pipeline.planning.plan import PlanRecord
from pipeline.process.runtime import Runtime
from pipeline.spec.job_spec import NOT_PART_OF_THE_WORK, JobSpec, stored
from storage import failpoints, locations
from storage.errors import (
    Conflict,
    IllegalTransition,
    InputChanged,
    InvalidInput,
    InvalidJob,
    QuotaExceeded,
    RowmillError,
    TransientError,
)
from storage.objects import output_probe
from storage.queue import jobs, publish_leases, regrouped_rows, reopen, schedules
from storage.queue.schedule_fires import Taken
from storage.records import FireKey, Job, ShardPlan
from storage.states import TERMINAL_JOB, JobState


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request that was found to be workable, with what its plan needs."""

    record: PlanRecord
    found: discovery.Inputs
    regrouped: repartition.Regrouped | None = None


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
    request = preflight.request_of(runtime, fields)
    spec = request.spec
    work = locations.work_dir(spec.output, f"estimate-{secrets.token_hex(8)}")
    try:
        found = discovery.discover(runtime.store, spec, work)
        columns = preflight.columns_of(request, found, runtime.notify)
    finally:
        runtime.store.delete_tree(work)
    found = found.narrowed(limit=spec.limit, sample=spec.sample)
    return Estimate(
        files=sum(1 for _ in found.files),
        rows=found.rows,
        n_bytes=sum(n_bytes for file in found.files for _, n_bytes in file.row_groups),
        shards=sum(1 for _ in shard_plan.plan(found.files, shard_rows=spec.shard_rows, shard_bytes=spec.shard_bytes)),
        engine=request.engine,
        columns=columns.read,
    )


def submit_job(
    runtime: Runtime, fields: dict[str, Any], *, resume: bool = False, plan: bool = False, fire: FireKey | None = None
) -> Job:
    """Validate a request and queue it as ``validating``. With ``resume``, the job that does the same work instead: the
    live one, or the completed one whose output is there and whose input and model are as they were.

    With ``plan`` the input is read first and the job comes back planned; without, in a fleet, it is looked at as far as
    this machine can. With ``fire``, that fire of a schedule is
    marked as submitted with it; raises :class:`IllegalTransition` when it is not pending any more. Raises
    :class:`InvalidJob` and its kin, naming the field and the reason. Nothing is stored then.
    """
    request = preflight.request_of(runtime, fields)
    spec, model, engine = request.spec, request.model, request.engine
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
        if not done.touched:  # else it is published once more
            runtime.notify(f"job {done.id} has done this already; --overwrite (overwrite=True) does it again")
        return done
    known = jobs.has_key(runtime.database, spec.tenant, spec.idempotency_key)
    if live is None and not known:
        if not plan and fire is None and runtime.settings.broker_url is not None:
            preflight.check_in_fleet(runtime, request)
        else:
            output_owner.refuse_taken(runtime, spec.output, overwrite=spec.overwrite)
    job_id = str(uuid_utils.uuid7())
    try:
        prepared = _prepare(runtime, job_id, request) if plan and live is None and not known else None
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
                refuse_job(runtime, job, error)
        raise


def _done_before(runtime: Runtime, spec: JobSpec, model: Model) -> Job | None:
    store, job = runtime.store, jobs.newest_on_output(runtime.database, spec.output)
    if job is None or job.state is not JobState.COMPLETED or job.n_dead or job.spec_hash != spec.work_hash():
        return None
    plan = PlanRecord.from_json(job.plan)
    if plan.model_digest != model.digest or not (job.touched or store.exists(locations.success(spec.output))):
        return None
    found = adapters.digests(spec.adapters, runtime.settings.cache_dir)
    if not all(plan.has_adapter(name, digest) for name, digest in found.items()):
        return None
    return job if _files_of(runtime, job, plan) == discovery.fingerprint_now(store, spec) else None


def _files_of(runtime: Runtime, job: Job, plan: PlanRecord) -> str | None:
    """The fingerprint of the files that the job was planned over; ``None`` where nobody has written it down."""
    if plan.files is not None or plan.converted:
        return plan.files
    return discovery.fingerprint((s.uri, s.etag) for s in publish_leases.all_sources(runtime.database, job.id))


def _differences(live: Job, spec: JobSpec) -> str:
    ours = spec.model_dump(mode="json")
    names = [name for name, value in ours.items() if name not in NOT_PART_OF_THE_WORK and live.spec.get(name) != value]
    return ", ".join(names) or "an older version"


def plan_job(runtime: Runtime, job: Job, interrupt: Cancellation | None = None, *, owner: str | None = None) -> Job:
    """Read the input's footers, check that the work can be done, and store the shards.

    The job of an incremental schedule takes only the files that no completed fire has taken as they are now; which
    these are is fixed here. A retry of a job that was planned before is gone on with. Raises :class:`InvalidJob` after
    recording the job as failed with that reason. While rows are regrouped, or chunks made again, raises
    :class:`LeaseLost` when another planner is at it, and :class:`Interrupted` when ``interrupt`` fires: the job can
    then be planned again. ``owner`` is who holds the planner's lease already.
    """
    schedule_id = schedules.incremental_of(runtime.database, job.id)
    done = None if schedule_id is None else partial(schedules.processed, runtime.database, schedule_id)
    try:
        spec = stored(job.spec)
        output_owner.check(runtime, job, over_rows=spec.overwrite or bool(job.plan))
        if job.plan:
            return lost_chunks.plan_again(runtime, job, spec, _limits(runtime), interrupt, owner)
        request = preflight.Request(spec, resolve(spec.model, runtime.settings.cache_dir), job.engine)
        prepared = _prepare(runtime, job.id, request, done)
        if (limits := _limits_if_regrouped(runtime, spec, prepared.found)) is not None:
            prepared = _regrouped(runtime, job, spec, prepared, limits, interrupt, owner)
    except InvalidJob as error:
        refuse_job(runtime, job, error)
        raise
    taken = None if schedule_id is None else Taken(schedule_id, tuple(prepared.found.originals))
    return _store_plan(runtime, job, spec, prepared, taken)


def _prepare(
    runtime: Runtime, job_id: str, request: preflight.Request, done: discovery.Processed | None = None
) -> _Prepared:
    spec, model = request.spec, request.model
    # Another worker may plan the same job, or run it already: nothing here is deleted but what was made here.
    work = locations.work_dir(spec.output, job_id)
    found = discovery.discover(runtime.store, spec, work, runtime.notify, done)
    columns = preflight.columns_of(request, found, runtime.notify)
    # An output that cannot hold the rows is refused now, not after the engine was loaded and rows were computed.
    output_probe.require(runtime.store, spec.output, work)
    converted = any(source.uri.startswith(work) for source in found.sources)
    with_adapters = adapters.digests(spec.adapters, runtime.settings.cache_dir)
    record = PlanRecord(
        found.schema,
        columns.read,
        columns.keep,
        model.digest,
        model.architectures,
        converted,
        adapters=with_adapters,
        input_rows=found.rows,
        files=discovery.fingerprint(found.originals),
    )
    return _Prepared(record, found.narrowed(limit=spec.limit, sample=spec.sample))


def _limits_if_regrouped(runtime: Runtime, spec: JobSpec, found: discovery.Inputs) -> repartition.Limits | None:
    """The limits for copying the job's rows into another order, where that is wanted."""
    limits = _limits(runtime)
    return limits if repartition.wanted(spec, found.rows, limits) else None


def _limits(runtime: Runtime) -> repartition.Limits:
    settings = runtime.settings
    return repartition.Limits(
        cluster_rows=settings.order_rows,
        n_bytes=settings.order_bytes // 4,
        batch_rows=settings.read_batch_rows,
        batch_bytes=settings.read_batch_bytes,
    )


def _regrouped(
    runtime: Runtime,
    job: Job,
    spec: JobSpec,
    prepared: _Prepared,
    limits: repartition.Limits,
    interrupt: Cancellation | None,
    owner: str | None,
) -> _Prepared:
    record, found = prepared.record, prepared.found
    with lease.held(runtime, job, interrupt, owner, "its rows were put in order") as going_on:
        runtime.notify("putting rows whose prompts begin alike into the same shards")
        columns = [name for name in record.schema.names if name in {*record.columns, *record.keep}]
        work = locations.work_dir(spec.output, job.id)
        try:
            made = repartition.regroup(runtime.store, spec, found, columns, work, limits, going_on)
        except InputChanged as error:
            raise InvalidInput(str(error), field="input") from error
        except (pa.ArrowException, ValueError, TypeError) as error:
            if isinstance(error, RowmillError):
                raise
            what = f"its rows could not be put in another order: {error}; use order 'auto'"
            raise InvalidInput(what, field="order") from error
    return replace(prepared, record=replace(record, part_rows=made.part_rows), regrouped=made)


def _store_plan(runtime: Runtime, job: Job, spec: JobSpec, prepared: _Prepared, taken: Taken | None = None) -> Job:
    made = prepared.regrouped
    shards: Iterable[ShardPlan] = _shards(runtime, spec, prepared) if made is None else made.shards
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
        refuse_job(runtime, job, error)
        raise


def _shards(runtime: Runtime, spec: JobSpec, prepared: _Prepared) -> Iterable[ShardPlan]:
    found, settings = prepared.found, runtime.settings
    shards = shard_plan.plan(found.files, shard_rows=spec.shard_rows, shard_bytes=spec.shard_bytes)
    if spec.sequence is None:
        return shards
    column = sequences.SequenceRows(
        runtime.store,
        {source.idx: source for source in found.sources},
        [item for file in found.files for item in file.slices()],
        schema=prepared.record.schema,
        column=spec.sequence,
        batch_rows=settings.read_batch_rows,
        batch_bytes=settings.read_batch_bytes,
    )
    return sequences.kept_whole(shards, column.spans())


def refuse_job(runtime: Runtime, job: Job, error: RowmillError) -> None:
    """End a job that waits for its plan, for this reason. Raises :class:`IllegalTransition` when it waits no more."""
    output_owner.release(runtime, job)
    jobs.refuse(runtime.database, job.id, str(error), actor=runtime.actor)
    if job.plan:
        return  # a retry of it: what it had finished before lies in its work folder
    with suppress(InvalidJob):  # a right to delete that is missing may be the very reason
        runtime.store.delete_tree(locations.work_dir(job.output_uri, job.id))


def cancel_job(runtime: Runtime, job_id: str) -> Job:
    """Begin to wind the job down; its finished rows will be published as partial."""
    return jobs.request_stop(runtime.database, job_id, "cancelled", actor=runtime.actor)


def retry_job(runtime: Runtime, job_id: str, *, failed_only: bool = True) -> Job:
    """Queue an ended job again: its unfinished shards, and its failed rows (or all rows)."""
    job = jobs.get(runtime.database, job_id)
    spec = stored(job.spec)
    regrouped, lost = bool(job.plan.get("part_rows")), False
    if job.state is JobState.COMPLETED and failed_only:
        if regrouped and chunks_are_gone(runtime.store, regrouped_rows.chunks(runtime.database, job_id)):
            raise Conflict(
                f"what job {job_id} was made of has been deleted (its rows lay in another order, in files of its own); "
                f"'rowmill job retry {job_id} --all' computes every row again"
            )
        nothing = not job.rows_failed and not job.n_dead
        lost = nothing and not runtime.store.exists(locations.success(job.output_uri))
    if job.state in TERMINAL_JOB and not job.plan and runtime.settings.broker_url is not None:
        model = resolve(spec.model, runtime.settings.cache_dir)
        preflight.check_in_fleet(runtime, preflight.Request(spec, model, job.engine))
    if job.state in TERMINAL_JOB:
        output_owner.refuse_retry(runtime, job, overwrite=spec.overwrite)
    reopened = reopen.reopen(
        runtime.database,
        job_id,
        failed_only=failed_only,
        window_seconds=spec.window_seconds,
        actor=runtime.actor,
        # Its shards read chunks: whoever plans makes those again that are gone.
        plan_again=regrouped or bool(job.plan.get("converted")),
        lost=lost,
    )
    output_owner.check(runtime, reopened, over_rows=True)
    return reopened
