"""From a request to a queued job: checked, resolved once, and stored."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import uuid_utils

from pipeline.engines import registry
from pipeline.inputs import discovery
from pipeline.jobs import preflight
from pipeline.jobs.plan import must_reorder, prepare, refuse_job, store_plan
from pipeline.output import owner as output_owner
from pipeline.planning import shard_plan
from pipeline.planning.plan import PlanRecord
from pipeline.process.runtime import Runtime
from pipeline.spec.job_spec import NOT_PART_OF_THE_WORK, JobSpec
from storage import failpoints, locations
from storage.errors import Conflict, IllegalTransition, InvalidJob, RowmillError, TransientError
from storage.queue import jobs, publish_leases
from storage.records import FireKey, Job, NewJob
from storage.states import JobState


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
    _notice(runtime, request)
    work = locations.work_dir(spec.output, f"estimate-{secrets.token_hex(8)}")
    try:
        found = discovery.discover(runtime.store, spec, work)
        columns = preflight.columns_of(runtime.store, request, found, runtime.notify)
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


def _notice(runtime: Runtime, request: preflight.Request) -> None:
    for notice in registry.notices(request.engine, request.spec, request.model):
        runtime.notify(notice)


def submit_job(
    runtime: Runtime, fields: dict[str, Any], *, resume: bool = False, plan: bool = False, fire: FireKey | None = None
) -> Job:
    """Validate a request and queue it as ``validating``. With ``resume``, the job that does the same work instead: the
    live one, or the completed one whose output is there and whose input and model have not changed.

    With ``plan`` the input is read first and the job comes back planned; without, in a fleet, it is looked at as far
    as this machine can. With ``fire``, that fire of a schedule is marked as submitted with it; raises
    :class:`IllegalTransition` when it is not pending any more. Raises :class:`InvalidJob` and its kin, naming the
    field and the reason. Nothing is stored then.
    """
    request = preflight.request_of(runtime, fields)
    spec = request.spec
    live = jobs.live_on_output(runtime.database, spec.output)
    if resume and (same := _same_work(runtime, request, live)) is not None:
        return same
    is_new = live is None and not jobs.has_key(runtime.database, spec.tenant, spec.idempotency_key)
    if is_new:
        _notice(runtime, request)
        if not plan and fire is None and runtime.settings.broker_url is not None:
            preflight.check_in_fleet(runtime, request)
        else:
            output_owner.refuse_taken(runtime, spec.output, overwrite=spec.overwrite)
    job_id = str(uuid_utils.uuid7())
    try:
        prepared = prepare(runtime, job_id, request) if plan and is_new else None
        failpoints.hit("plan.prepared")
        job = _insert(runtime, job_id, request, fire)
    except BaseException:
        with suppress(RowmillError):  # what cannot be deleted may be the very reason
            runtime.store.delete_tree(locations.work_dir(spec.output, job_id))
        raise
    if job.id != job_id:
        runtime.store.delete_tree(locations.work_dir(spec.output, job_id))
        return job
    failpoints.hit("submit.inserted")
    _own_output(runtime, job, spec)
    if prepared is None or must_reorder(runtime, prepared):
        return job
    try:
        return store_plan(runtime, job, prepared)
    except IllegalTransition:  # somebody who runs what is queued was faster: planned, or stopped
        return jobs.get(runtime.database, job.id)


def _same_work(runtime: Runtime, request: preflight.Request, live: Job | None) -> Job | None:
    """The job that does the same work: ``live``, or a completed one whose output still stands.

    Raises :class:`Conflict` when the live job on the output has other settings.
    """
    spec = request.spec
    if live is not None:
        if live.spec_hash == spec.work_hash():
            if spec.overwrite:
                output_owner.acquire(runtime, live, overwrite=True)
            return live
        raise Conflict(
            f"job {live.id} ({live.state}) already writes there, with other settings ({_differences(live, spec)}); "
            f"give the same ones to resume it, choose another output, or 'rowmill job cancel {live.id}'",
            field="output",
        )
    if spec.overwrite or (done := _done_before(runtime, request)) is None:
        return None
    if not done.needs_republish:  # else it is published once more
        runtime.notify(f"job {done.id} has done this already; --overwrite (overwrite=True) does it again")
    return done


def _insert(runtime: Runtime, job_id: str, request: preflight.Request, fire: FireKey | None) -> Job:
    spec, engine = request.spec, request.engine
    new = NewJob(
        id=job_id,
        tenant=spec.tenant,
        priority=spec.priority,
        queue=engine,
        engine=engine,
        engine_key=registry.engine_key(engine, request.model, spec.task, spec.engine_options),
        spec=spec.model_dump(mode="json"),
        spec_hash=spec.work_hash(),
        idempotency_key=spec.idempotency_key,
        output_uri=spec.output,
        max_failed_rows=spec.max_failed_rows,
        model=request.registered,
    )
    create = runtime.settings.unknown_tenants == "create"
    window = spec.window_seconds
    return jobs.insert(runtime.database, new, window_seconds=window, actor=runtime.actor, new_tenant=create, fire=fire)


def _own_output(runtime: Runtime, job: Job, spec: JobSpec) -> None:
    """After the job was stored: an owner that its database does not know would stand in everybody's way."""
    try:
        output_owner.acquire(runtime, job, overwrite=spec.overwrite)
    except RowmillError as error:
        if runtime.settings.broker_url is not None and (
            error.retry_on_other_worker or isinstance(error, TransientError)
        ):
            runtime.notify(f"the output is left to a worker to take, since it cannot be reached from here: {error}")
            return
        if isinstance(error, InvalidJob):
            with suppress(IllegalTransition):  # a planner has refused it already
                refuse_job(runtime, job, error)
        raise


def _done_before(runtime: Runtime, request: preflight.Request) -> Job | None:
    spec, store = request.spec, runtime.store
    job = jobs.newest_on_output(runtime.database, spec.output)
    if job is None or job.state is not JobState.COMPLETED or job.n_failed_shards or job.spec_hash != spec.work_hash():
        return None
    plan = PlanRecord.from_json(job.plan)
    if plan.model_digest != request.model.digest or not (
        job.needs_republish or store.exists(locations.success(spec.output))
    ):
        return None
    if not all(plan.has_adapter(name, digest) for name, digest in request.adapters.items()):
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
