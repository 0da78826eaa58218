"""One shard's final file: what it committed, or what there is of it when the job did not complete."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pipeline.output import assemble, manifest
from pipeline.output.destination import published
from pipeline.planning.plan import PlanRecord
from pipeline.process.runtime import Runtime
from pipeline.spec.job_spec import stored
from storage import locations
from storage.errors import CorruptFile, InputChanged, InvalidInput
from storage.objects.store import ObjectStore
from storage.queue import publish_leases
from storage.queue.publish_leases import FinishedShard
from storage.records import Job, PartFile, Shard


def publish_shard(
    runtime: Runtime, job: Job, closed: FinishedShard, earlier: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Put a shard's final file in its place; returns its entry of the manifest, or ``None`` without a row to publish.

    ``earlier``: the entries of what this job had published before, by path. Such a file stays when it holds more rows
    than there are now: those that were flushed may have been collected since. Raises :class:`CorruptFile` when the
    committed file is gone or damaged.
    """
    store, shard = runtime.store, closed.shard
    target = locations.part(job.output_uri, shard.idx)
    if closed.output is not None:
        return _publish_whole(store, shard, target, closed.output)
    before = _still_there(store, target, earlier)
    if not closed.parts and closed.previous_output is None:
        return before
    try:
        assembled = assemble_partial(runtime, job, closed)
    except (InputChanged, CorruptFile, InvalidInput) as error:
        # Its finished rows cannot be put beside columns of another version of the file, or one of them is gone; the
        # job's error says so. What an earlier generation published stands: it may be the only copy.
        if closed.previous_output is not None:
            try:
                entry = _publish_whole(store, shard, target, closed.previous_output)
            except CorruptFile:
                pass
            else:
                runtime.notify(f"shard {shard.idx} stays as it was published before: {error}")
                return entry
        if before is not None:
            runtime.notify(f"shard {shard.idx} stays as it was published before: {error}")
            return before
        runtime.notify(f"shard {shard.idx} is left out of the partial output: {error}")
        return None
    if before is not None and before["rows"] > assembled.n_rows:
        return before
    if assembled.n_rows == 0:
        return None
    store.publish(assembled.written.uri, target, sha256=assembled.written.sha256)
    return manifest.part(
        target,
        n_bytes=assembled.written.n_bytes,
        sha256=assembled.written.sha256,
        row_start=shard.row_start,
        rows=assembled.n_rows,
        failed=assembled.n_failed,
        missing=[(shard.row_start + low, shard.row_start + high) for low, high in assembled.missing],
    )


def _publish_whole(store: ObjectStore, shard: Shard, target: str, file: PartFile) -> dict[str, Any]:
    """Publish the committed file of all the shard's rows, or leave it where it was published before."""
    store.publish(file.uri, target, sha256=file.sha256, n_bytes=file.n_bytes)
    return manifest.part(
        target,
        n_bytes=file.n_bytes,
        sha256=file.sha256,
        row_start=shard.row_start,
        rows=shard.row_n,
        failed=len(file.failed),
        missing=(),
    )


def assemble_partial(runtime: Runtime, job: Job, closed: FinishedShard) -> assemble.Assembled:
    """What an unfinished shard has flushed, on top of what it builds on, as one file; not published yet."""
    shard, plan = closed.shard, PlanRecord.from_json(job.plan)
    spec = stored(job.spec)
    base = (
        closed.previous_output
        if plan.part_rows
        else published(runtime.store, job.output_uri, shard.idx, closed.previous_output)
    )
    directory = locations.attempt_dir(
        job.output_uri, job.id, shard.idx, shard.gen, shard.attempt_no, f"partial-{secrets.token_hex(4)}"
    )
    schema = assemble.stored_result_schema(runtime.store, closed.parts, base, plan.keep, spec.output_prefix)
    return assemble.assemble(
        runtime.input_rows(publish_leases.shard_sources(runtime.database, shard), shard.slices, plan.schema),
        f"{directory}/output.parquet",
        assemble.OutputColumns(plan.keep, schema, spec.output_prefix),
        parts=closed.parts,
        base=base,
        partial=True,
    )


def _still_there(store: ObjectStore, target: str, earlier: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    entry = earlier.get(manifest.path(target))
    return dict(entry) if entry is not None and store.holds(target, entry["sha256"]) else None
