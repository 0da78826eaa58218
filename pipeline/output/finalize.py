"""Finalizing: committed shard files become ``data/part-*.parquet``, then ``_manifest.json``, then ``_SUCCESS``.

Every step may be run again, so that another finalizer can go on when one dies.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from typing import Any

import pyarrow as pa

from pipeline.output import assemble, manifest, merge_regrouped, openai_lines, owner
from pipeline.output.destination import chunks_are_gone, earlier_parts, is_free
from pipeline.output.publish_shard import publish_shard
from pipeline.planning.plan import PlanRecord
from pipeline.process import metrics
from pipeline.process.heartbeat import lease_renewer
from pipeline.process.runtime import Runtime
from pipeline.spec.job_spec import stored
from pipeline.spec.result_columns import fields_of
from storage import failpoints, locations
from storage.errors import Conflict, CorruptFile, LeaseLost, TransientError
from storage.fleet import garbage, reports
from storage.logs import bound
from storage.parquet import parquet
from storage.queue import job_deaths, publish_leases, regrouped_rows
from storage.queue.publish_leases import LostOutput
from storage.records import Job
from storage.sql.retry import retry_write
from storage.states import TERMINAL_JOB, JobState

_RENEW_EVERY = 50
_MOST_PUTS = 20
_LIBRARIES = ("rowmill", "pyarrow", "fsspec", "sqlalchemy")
"""Named with their versions in the manifest; the engines report their own libraries."""


def finalize_job(runtime: Runtime, job_id: str | None = None) -> Job | None:
    """Publish one job whose shards have all ended; ``None`` when there is none (or another finalizer has it)."""
    job = claim_job(runtime, job_id)
    return None if job is None else publish_claimed(runtime, job)


def claim_job(runtime: Runtime, job_id: str | None = None) -> Job | None:
    """Take the publisher's lease of a job whose shards have all ended; ``None`` when there is none to take."""
    settings = runtime.settings
    job_deaths.count(runtime.database, max_losses=settings.max_losses, actor=runtime.actor, job_id=job_id)
    return publish_leases.claim_finalize(
        runtime.database, owner=runtime.actor, lease_seconds=settings.lease_seconds, job_id=job_id
    )


def publish_claimed(runtime: Runtime, job: Job) -> Job:
    """Publish a job that :func:`claim_job` gave; returns it as it ended.

    A job that cannot be published is freed, so that whoever comes next need not wait for this one's lease.
    """
    settings = runtime.settings
    failpoints.hit("finalize.claimed")
    try:
        whose = f"the finalizer of job {job.id}"
        ids = bound(tenant=job.tenant, job_id=job.id, worker=runtime.worker.id)
        with ids, lease_renewer(lambda: _renew(runtime, job), lease_seconds=settings.lease_seconds, whose=whose):
            return _finalize(runtime, job)
    except Exception as error:
        reason = str(error) or type(error).__name__
        # If the lease is already lost, this finalizer may have changed the output after losing it, so the current owner
        # must publish again.
        try:
            retry_write(
                lambda: publish_leases.give_back(
                    runtime.database, job, delay=settings.again_seconds, error=reason, actor=runtime.actor
                )
            )
        except LeaseLost:
            retry_write(lambda: publish_leases.request_republish(runtime.database, job.output_uri, actor=runtime.actor))
        raise


def _finalize(runtime: Runtime, job: Job) -> Job:
    while True:
        job, target, error = _published(runtime, job)
        failpoints.hit("finalize.complete")
        useless = _useless(runtime, job, target)
        # Listed before the job ends: from then on a retry may begin, whose attempts write below the same place.
        files = runtime.store.list_tree(useless) if useless is not None and _is_embedded(runtime) else []
        owner.release(runtime, job)
        ended = _complete(runtime, job, target, error)
        if ended is not None:
            break
    _let_go(runtime, ended, useless, files)
    return ended


def _published(runtime: Runtime, job: Job) -> tuple[Job, JobState, str | None]:
    """Publish what there is. Returns the job afterwards, its final state, and why it does not complete."""
    try:
        job = _publish(runtime, job)
    except Conflict as error:
        # The output is another job's by now, and is left alone. The work stays, for a retry.
        target = JobState.FAILED if job.state is JobState.FINALIZING else publish_leases.end_state(job)
        return job, target, job.error or str(error)
    target = publish_leases.end_state(job)
    return job, target, job.error or _why(runtime, job, target)


def _complete(runtime: Runtime, job: Job, target: JobState, error: str | None) -> Job | None:
    return retry_write(lambda: publish_leases.complete(runtime.database, job, target, actor=runtime.actor, error=error))


def _why(runtime: Runtime, job: Job, target: JobState) -> str | None:
    if target is not JobState.FAILED:
        return None
    first = publish_leases.first_failed_shard(runtime.database, job.id)
    detail = f"; shard {first.idx}: {first.error}" if first else ""
    return f"{job.n_failed_shards} of {job.n_shards} shards failed{detail}"


def _publish(runtime: Runtime, job: Job) -> Job:
    """Returns the job afterwards: a shard whose committed file is found to be lost counts as failed."""
    store, output, target = runtime.store, job.output_uri, publish_leases.end_state(job)
    if target is not JobState.COMPLETED and not job.publishing and not is_free(store, output):
        runtime.notify(f"{output} keeps what an earlier job published; this one did not complete")
        return job
    publish_leases.begin_publishing(runtime.database, job, actor=runtime.actor)
    failpoints.hit("finalize.publishing")
    if job.plan:  # else it has no row to publish, and may not be able to write there at all
        owner.check(runtime, job)
    if job.state in TERMINAL_JOB and chunks_are_gone(store, regrouped_rows.chunks(runtime.database, job.id)):
        runtime.notify(f"{output} cannot be published once more: what it was made of has been deleted")
        return job
    earlier = {} if target is JobState.COMPLETED else earlier_parts(store, job)
    # Readers trust the marks, so these go first and come back last.
    lines = [locations.openai_lines(output, failed=failed) for failed in (False, True)]
    store.delete([locations.success(output), locations.manifest(output), *lines])
    entries, names, lost = _publish_shards(runtime, job, earlier)
    if lost:
        job = publish_leases.drop_lost_outputs(runtime.database, job, lost, actor=runtime.actor)
        target = publish_leases.end_state(job)
    # A completed job that is published once more, and whose file is lost by now, is not whole any more.
    whole = target is JobState.COMPLETED and not job.n_failed_shards
    if not entries and whole:
        names.add(_publish_empty(runtime, job))
    if whole and (rows := sum(entry["rows"] for entry in entries)) != job.rows_total:
        raise CorruptFile(f"job {job.id} has {job.rows_total:,} rows, and its files {rows:,}: it is not published")
    _guard(runtime, job)
    _remove_stale(runtime, output, names)
    if (spec := stored(job.spec)).openai_lines:
        openai_lines.write(store, job, entries, spec.output_prefix)
        _guard(runtime, job)
    if not entries and not whole:
        return job
    failpoints.hit("finalize.manifest")
    document = manifest.build(
        job=replace(job, state=target),
        parts=entries,
        sources=publish_leases.all_sources(runtime.database, job.id),
        attempts=publish_leases.engine_facts(runtime.database, job.id),
        published_at=runtime.database.clock(),
        measured=metrics.of_job(reports.measured(runtime.database, job.id)),
        versions={"python": platform.python_version()} | {name: metadata.version(name) for name in _LIBRARIES},
    )
    _guard(runtime, job)
    failpoints.hit("finalize.put")
    _put_manifest(runtime, job, json.dumps(document, indent=2).encode())
    failpoints.hit("finalize.success")
    if whole:
        _guard(runtime, job)
        store.put_bytes(locations.success(output), b"")
    return job


def _publish_shards(
    runtime: Runtime, job: Job, earlier: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], set[str], dict[str, LostOutput]]:
    """The manifest's entries of what was published, the files' names, and shards whose committed files are lost."""
    closed_shards = publish_leases.finished_shards(runtime.database, job.id)
    part_rows = PlanRecord.from_json(job.plan).part_rows if job.plan else None
    if part_rows is not None:
        made = merge_regrouped.publish(
            runtime, job, closed_shards, part_rows=part_rows, earlier=earlier, renew=lambda: _guard(runtime, job)
        )
        return made.entries, made.names, made.lost
    entries: list[dict[str, Any]] = []
    names: set[str] = set()
    lost: dict[str, LostOutput] = {}
    for count, closed in enumerate(closed_shards):
        if count % _RENEW_EVERY == 0:
            _renew(runtime, job)
        owner.check(runtime, job)
        try:
            entry = publish_shard(runtime, job, closed, earlier)
        except CorruptFile as error:
            # What an earlier generation computed of it is better than nothing.
            older = replace(closed, output=None, parts=())
            entry = publish_shard(runtime, job, older, {})
            lost[closed.shard.id] = LostOutput(str(error), previous_stands=entry is not None)
            entry = entry or publish_shard(runtime, job, replace(older, previous_output=None), earlier)
        if entry is not None:
            failpoints.hit("finalize.part")
            names.add(locations.part(job.output_uri, closed.shard.idx))
            entries.append(entry)
    return entries, names, lost


def _put_manifest(runtime: Runtime, job: Job, content: bytes) -> None:
    """Put it where none is: a late finalizer does not replace the manifest of the one that followed it.

    Raises :class:`TransientError` when something stands there each time, whatever was deleted.
    """
    uri = locations.manifest(job.output_uri)
    for _ in range(_MOST_PUTS):
        try:
            runtime.store.put_bytes(uri, content, if_absent=True)
        except FileExistsError:
            _guard(runtime, job)  # it is a late one's, if this finalizer is still the one
            runtime.store.delete([uri])
        else:
            return
    raise TransientError(f"{uri} is still there after it was deleted {_MOST_PUTS} times: see what keeps it there")


def _publish_empty(runtime: Runtime, job: Job) -> str:
    """A job without rows still has a file to read: kept columns, the results that need no model to know, ``error``."""
    plan, spec = PlanRecord.from_json(job.plan), stored(job.spec)
    target = locations.part(job.output_uri, 0)
    schema = assemble.OutputColumns(plan.keep, pa.schema(fields_of(spec)), spec.output_prefix).schema(plan.schema)
    with parquet.writer(runtime.store, target, schema) as file:
        file.write(schema.empty_table())
    return target


def _remove_stale(runtime: Runtime, output: str, names: set[str]) -> None:
    """Delete what an earlier run, or an earlier generation, published and this one did not."""
    there = runtime.store.find(f"{locations.data_dir(output)}/*.parquet")
    runtime.store.delete([item.uri for item in there if item.uri not in names])


def _renew(runtime: Runtime, job: Job) -> None:
    publish_leases.renew(runtime.database, job, lease_seconds=runtime.settings.lease_seconds)


def _guard(runtime: Runtime, job: Job) -> None:
    """Before a step that changes the output: :class:`LeaseLost`, or :class:`Conflict` where it is another job's."""
    _renew(runtime, job)
    if job.plan:
        owner.check(runtime, job)


def _is_embedded(runtime: Runtime) -> bool:
    return runtime.settings.broker_url is None


def _useless(runtime: Runtime, job: Job, target: JobState) -> str | None:
    """The folder of which nothing is needed once the job has ended.

    A whole output needs none of the work (only a retry of failed rows reads converted input again). What a partial one
    was made of stays for a retry, until the retention is over; where nothing was flushed, there is nothing to keep.
    """
    work = locations.work_dir(job.output_uri, job.id)
    if target is not JobState.COMPLETED or job.n_failed_shards:
        return None if reports.progress(runtime.database, job).rows_done else work
    if job.rows_failed and job.plan.get("part_rows"):
        return None
    if job.rows_failed and job.plan["converted"]:
        return locations.attempts_dir(job.output_uri, job.id)
    return work


def _let_go(runtime: Runtime, job: Job, useless: str | None, files: list[str]) -> None:
    """Delete, of what is useless, the files that were there when the job ended; in a fleet, after the retention."""
    settings, work = runtime.settings, locations.work_dir(job.output_uri, job.id)
    if useless is not None and _is_embedded(runtime):
        runtime.store.delete_tree(useless, files)
    if useless != work or not _is_embedded(runtime):
        garbage.enqueue(runtime.database, job.id, work, delay=settings.attempt_retention_hours * 3600)
