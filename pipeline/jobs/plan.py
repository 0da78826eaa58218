"""From a request to its shards: look at the input, check the columns, put rows in order, store the plan.

The order is the same for both ways in. Without a fleet, ``submit`` prepares the plan before the job is stored, so that
nothing is stored of a request that cannot run. In a fleet a worker does all of it (:func:`plan_job`).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import pyarrow as pa

from pipeline.engines.base import Cancellation
from pipeline.inputs import discovery
from pipeline.jobs import lost_chunks, preflight
from pipeline.output import owner as output_owner
from pipeline.planning import repartition, sequences, shard_plan
from pipeline.planning.context import PlanContext, limits_of
from pipeline.planning.plan import PlanRecord
from pipeline.process.runtime import Runtime
from storage import locations
from storage.errors import InputChanged, InvalidInput, InvalidJob, QuotaExceeded, RowmillError
from storage.objects import output_probe
from storage.queue import jobs, schedules
from storage.queue.schedules import ConsumedFiles
from storage.records import Job, ShardPlan


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was found to be workable, with what its plan needs.

    ``in_order``: the copies of the rows in another order, where that is wanted.
    """

    request: preflight.Request
    record: PlanRecord
    found: discovery.Inputs
    in_order: repartition.Repartitioned | None = None


def plan_job(runtime: Runtime, job: Job, interrupt: Cancellation | None = None, *, owner: str | None = None) -> Job:
    """Read the input's footers, check that the work can be done, and store the shards.

    The job of an incremental schedule takes only the files whose present version no completed fire has taken; which
    these are is fixed here. A retry of a job that was planned before is gone on with. Raises :class:`InvalidJob` after
    recording the job as failed with that reason. While rows are repartitioned, or chunks made again, raises
    :class:`LeaseLost` when another planner is at it, and :class:`Interrupted` when ``interrupt`` fires: the job can
    then be planned again. ``owner`` is who holds the planner's lease already.
    """
    schedule_id = schedules.incremental_of(runtime.database, job.id)
    done = None if schedule_id is None else partial(schedules.processed, runtime.database, schedule_id)
    try:
        context = PlanContext.of(runtime, job, interrupt, owner)
        output_owner.check(runtime, job, over_rows=context.spec.overwrite or bool(job.plan))
        if job.plan:
            return lost_chunks.plan_again(context)
        prepared = prepare(runtime, job.id, preflight.request_of_job(runtime, job, context.spec), done)
        if must_reorder(runtime, prepared):
            prepared = _reordered(context, prepared)
    except InvalidJob as error:
        refuse_job(runtime, job, error)
        raise
    consumed = None if schedule_id is None else ConsumedFiles(schedule_id, tuple(prepared.found.originals))
    return store_plan(runtime, job, prepared, consumed)


def prepare(
    runtime: Runtime, job_id: str, request: preflight.Request, done: discovery.Processed | None = None
) -> Prepared:
    """Look at the input, check its columns against the engine's, and whether the output can be written.

    ``done`` says which files an incremental schedule has processed. Raises :class:`InvalidJob` and its kin.
    """
    spec, model = request.spec, request.model
    # Another worker may plan the same job, or run it already: nothing here is deleted but what was made here.
    work = locations.work_dir(spec.output, job_id)
    found = discovery.discover(runtime.store, spec, work, runtime.notify, done)
    columns = preflight.columns_of(runtime.store, request, found, runtime.notify)
    # An output that cannot hold the rows is refused now, not after the engine was loaded and rows were computed.
    output_probe.require(runtime.store, spec.output, work)
    record = PlanRecord(
        found.schema,
        columns.read,
        columns.keep,
        model.digest,
        model.architectures,
        converted=any(source.uri.startswith(work) for source in found.sources),
        adapters=request.adapters,
        input_rows=found.rows,
        files=discovery.fingerprint(found.originals),
    )
    return Prepared(request, record, found.narrowed(limit=spec.limit, sample=spec.sample))


def must_reorder(runtime: Runtime, prepared: Prepared) -> bool:
    """Whether the job's rows have to be copied into another order before its shards are known.

    That reads all of the input, so it is for whoever runs the job, who begins again after a crash.
    """
    return repartition.wanted(prepared.request.spec, prepared.found.rows, limits_of(runtime))


def _reordered(context: PlanContext, prepared: Prepared) -> Prepared:
    record, found, runtime = prepared.record, prepared.found, context.runtime
    columns = [name for name in record.schema.names if name in {*record.columns, *record.keep}]
    with context.lease("its rows were put in order") as going_on:
        runtime.notify("putting rows whose prompts begin alike into the same shards")
        rows = repartition.JobRows(runtime.store, found, columns, context.limits, going_on)
        try:
            made = repartition.repartition(rows, context.spec, context.work_dir)
        except InputChanged as error:
            raise InvalidInput(str(error), field="input") from error
        except (pa.ArrowException, ValueError, TypeError) as error:
            if isinstance(error, RowmillError):
                raise
            what = f"its rows could not be put in another order: {error}; use order 'auto'"
            raise InvalidInput(what, field="order") from error
    return replace(prepared, record=replace(record, part_rows=made.part_rows), in_order=made)


def store_plan(runtime: Runtime, job: Job, prepared: Prepared, consumed: ConsumedFiles | None = None) -> Job:
    """Cut the shards and store them with the plan; returns the job, which can be claimed from now on.

    ``consumed``: the files of an incremental schedule that it takes. Raises :class:`QuotaExceeded` after recording the
    job as failed with that reason.
    """
    found, in_order = prepared.found, prepared.in_order
    try:
        return jobs.set_planned(
            runtime.database,
            job.id,
            plan=prepared.record.to_json(),
            sources=found.sources if in_order is None else chain(found.sources, in_order.chunks),
            shards=_shards(runtime, prepared) if in_order is None else in_order.shards,
            actor=runtime.actor,
            consumed=consumed,
        )
    except QuotaExceeded as error:
        refuse_job(runtime, job, error)
        raise


def _shards(runtime: Runtime, prepared: Prepared) -> Iterable[ShardPlan]:
    spec, found = prepared.request.spec, prepared.found
    shards = shard_plan.plan(found.files, shard_rows=spec.shard_rows, shard_bytes=spec.shard_bytes)
    if spec.sequence is None:
        return shards
    sources = {source.idx: source for source in found.sources}
    slices = [item for file in found.files for item in file.slices()]
    column = sequences.SequenceRows(runtime.input_rows(sources, slices, prepared.record.schema), spec.sequence)
    return sequences.kept_whole(shards, column.spans())


def refuse_job(runtime: Runtime, job: Job, error: RowmillError) -> None:
    """End a job that waits for its plan, for this reason. Raises :class:`IllegalTransition` when it no longer waits."""
    output_owner.release(runtime, job)
    jobs.refuse(runtime.database, job.id, str(error), actor=runtime.actor)
    if job.plan:
        return  # a retry of it: what it had finished before lies in its work folder
    with suppress(InvalidJob):  # a right to delete that is missing may be the very reason
        runtime.store.delete_tree(locations.work_dir(job.output_uri, job.id))
