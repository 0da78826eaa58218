"""Chunks that a job was planned over, made again where they are gone: converted input, and regrouped rows.

They lie in the job's work folder, which is deleted when a job ends without rows, and after the retention. So a retry
finds them, or makes them again from the input, as long as that is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pyarrow as pa

from pipeline.inputs import discovery
from pipeline.inputs.discovery import Inputs
from pipeline.inputs.disk_list import DiskBackedList
from pipeline.inputs.row_groups import InputFile
from pipeline.output.destination import outputs_gone
from pipeline.planning import repartition
from pipeline.planning.context import PlanContext
from pipeline.planning.plan import PlanRecord
from storage.errors import InputChanged, InvalidInput
from storage.parquet import parquet
from storage.queue import publish_leases, regrouped_rows, reopen
from storage.records import Job, Source
from storage.sql.retry import retry_write


def plan_again(context: PlanContext) -> Job:
    """Go on with the retry of a planned job: the chunks that its shards will read are there again then.

    Raises :class:`InvalidInput` when the input is not what the job was planned over, and what
    :meth:`PlanContext.lease` raises.
    """
    runtime, job, plan = context.runtime, context.job, PlanRecord.from_json(context.job.plan)
    with context.lease("what was made of its input is looked for") as going_on:
        going_on()
        # Merged with others into the output, and kept nowhere else.
        closed = () if plan.part_rows is None else publish_leases.finished_shards(runtime.database, job.id)
        lost = outputs_gone(runtime.store, job, closed)
        maker = _Maker(context, plan, going_on)
        wanted = reopen.sources_to_read(runtime.database, job, lost)
        if maker.gone(wanted):
            runtime.notify("reading the input again: files that were made of it were deleted when the job ended")
            maker.make(regrouped_rows.sources(runtime.database, job.id), maker.gone(wanted))
        if maker.gone(wanted):
            raise InvalidInput("the input does not give the rows that the job was planned over; submit a new job")
        changed = [new for old, new in zip(wanted, maker.now(wanted), strict=True) if new != old]
    return retry_write(lambda: reopen.planned_again(runtime.database, job.id, changed, lost, actor=runtime.actor))


class _Maker:
    """Knows which sources are files of our own, what became of them, and how to make them."""

    def __init__(self, context: PlanContext, plan: PlanRecord, going_on: Callable[[], object]) -> None:
        self._store, self._spec, self._work_dir = context.runtime.store, context.spec, context.work_dir
        self._plan, self._limits, self._going_on = plan, context.limits, going_on

    def gone(self, sources: Sequence[Source]) -> list[Source]:
        """Those of our own that are gone, or do not have the rows that they should."""
        return [source for source in sources if self._is_ours(source) and not self._is_there(source)]

    def now(self, sources: Sequence[Source]) -> list[Source]:
        """The same sources; of those of our own, the files that are there now."""
        return [self._found(source) if self._is_ours(source) else source for source in sources]

    def make(self, sources: Sequence[Source], gone: Sequence[Source]) -> None:
        """Make those that are ``gone``; ``sources`` are all of the job's, in order. Raises :class:`InvalidInput`."""
        self._store.delete([source.uri for source in gone])  # where there is one, it has other rows
        originals = [source for source in sources if source.rows is None]
        regrouped = [source for source in gone if source.rows is not None]
        # Regrouped rows are read from the converted ones.
        missing = self.gone(originals) if regrouped else gone
        if missing:
            converted = [source.uri for source in originals if self._is_ours(source)]
            uris = [source.uri for source in missing]
            discovery.convert_again(self._store, self._spec, self._work_dir, converted, uris)
        if regrouped:
            self._regroup(self.now(originals), regrouped)

    def _regroup(self, originals: Sequence[Source], chunks: Sequence[Source]) -> None:
        store, plan, spec = self._store, self._plan, self._spec
        files = DiskBackedList(InputFile(item.idx, parquet.stats(store, item.uri).row_groups) for item in originals)
        found = Inputs(DiskBackedList(originals), files, plan.schema, []).narrowed(limit=spec.limit, sample=spec.sample)
        columns = [name for name in plan.schema.names if name in {*plan.columns, *plan.keep}]
        try:
            rows = repartition.JobRows(store, found, columns, self._limits, self._going_on)
            repartition.rewrite_chunks(rows, chunks)
        except InputChanged as error:
            raise InvalidInput(str(error), field="input") from error
        except pa.ArrowException as error:
            raise InvalidInput(f"its rows could not be put in the order of the plan: {error}") from error

    def _is_ours(self, source: Source) -> bool:
        return source.uri.startswith(self._work_dir)

    def _is_there(self, source: Source) -> bool:
        info = self._store.stat(source.uri)
        if info is None:
            return False
        if info.etag == source.etag:
            return True
        try:
            return parquet.stats(self._store, source.uri).n_rows == source.n_rows
        except InvalidInput:
            return False

    def _found(self, source: Source) -> Source:
        info = self._store.info(source.uri)
        return replace(source, etag=info.etag, n_bytes=info.n_bytes)
