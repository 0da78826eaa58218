"""The shard's output file: its input columns and everything that its attempts have flushed, in the order of rows."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
from pyroaring import BitMap

from pipeline.execution.attempt_context import AttemptContext
from pipeline.execution.flush import Whole
from pipeline.execution.part_repair import drop_corrupt_parts
from pipeline.output import assemble, owner
from pipeline.output.destination import published
from storage.errors import CorruptFile
from storage.records import OUTPUT_SEQ, PartFile


def assemble_shard(
    attempt: AttemptContext, schema: pa.Schema, flushed: list[PartFile], whole: Whole | None = None
) -> PartFile:
    """Write and verify the shard's file from the parts of earlier attempts and those ``flushed`` by this one, or from
    all its results, which were not.

    ``schema`` is the engine's, of the results. Raises :class:`CorruptFile` when a part no longer holds what was
    flushed: its rows are then computed again by the next attempt.
    """
    parts = (*attempt.claim.parts, *flushed)
    try:
        with attempt.measures.spent("write_seconds"):
            if whole is not None:
                owner.check(attempt.runtime, attempt.claim.job)
                attempt.measures.flushed(whole.results.num_rows, 0.0)
            return _assemble(attempt, schema, parts, None if whole is None else whole.results)
    except CorruptFile as error:
        lost = drop_corrupt_parts(attempt.runtime, attempt.claim, parts)
        if not lost:
            raise
        raise CorruptFile(f"{error}; {lost} flushed rows have to be computed again") from error


def _assemble(
    attempt: AttemptContext, schema: pa.Schema, parts: tuple[PartFile, ...], results: pa.Table | None
) -> PartFile:
    claim, plan, runtime = attempt.claim, attempt.plan, attempt.runtime
    store, shard = runtime.store, claim.shard
    assembled = assemble.assemble(
        replace(attempt.rows, batch_rows=runtime.settings.copy_batch_rows),
        f"{attempt.directory}/output.parquet",
        assemble.OutputColumns(plan.keep, schema, attempt.spec.output_prefix),
        parts=parts,
        base=claim.previous_output
        if plan.part_rows
        else published(store, claim.job.output_uri, shard.idx, claim.previous_output),
        results=results,
    )
    store.verify(assembled.written)
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
