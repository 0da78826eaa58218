"""The Python face of Rowmill: submit jobs, follow them, read their output.

>>> from pipeline import Client
>>> with Client() as client:
...     job = client.submit(input="texts.parquet", output="out", model="minilm/", task="embed", column="text")
...     job.wait()
...     job.table()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pipeline.boundary import Limit, Moment, Text, Whole, boundary, own
from pipeline.client import frame_jobs
from pipeline.client.failed_rows import row_status
from pipeline.client.handle import JobHandle, state_named
from pipeline.client.keys import Keys
from pipeline.client.session import Session
from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.jobs.status_query import job_status
from pipeline.jobs.submit import Estimate, estimate, submit_job
from pipeline.process.attendance import with_attendance
from pipeline.process.runtime import Runtime
from pipeline.registry.api import Models, person
from pipeline.schedules.api import Schedules
from pipeline.spec.status import JobStatus, RequestStatus
from storage import locations
from storage.broker import Wakeups
from storage.errors import Conflict, InvalidJob, InvalidSettings
from storage.fleet import job_lookup
from storage.queue import jobs
from storage.states import TERMINAL_JOB, JobState
from storage.tenants import tenants
from storage.tenants.tenants import Tenant, Usage

if TYPE_CHECKING:
    import pyarrow as pa

_ID_LENGTH = 36


@boundary
class Client:
    """Jobs in the database that the settings name. Whatever goes wrong is a :class:`~storage.errors.RowmillError`.

    ``Client(data_dir="…")``: any setting by its name; those that are not given are read as the command line reads them.
    ``Client(settings=Settings(…))`` takes all of them at once.

    Without a broker (the embedded default) a submitted job runs in background threads of this process. When the process
    ends first, in whatever way, what is finished is flushed, and the next ``wait`` on the job, in any process, goes on
    from it. Only ``SIGKILL`` and ``os._exit`` leave no time for that; then the rows since the last flush are computed
    again.
    """

    def __init__(self, *, settings: Settings | None = None, **values: Any) -> None:
        if settings is not None and values:
            raise InvalidSettings(f"give settings, or {', '.join(values)} by name; not both", field="settings")
        self._session = Session(settings or Settings(**values))

    @classmethod
    def over(cls, session: Session) -> Client:
        """A client of a session that is open already."""
        client = cls.__new__(cls)
        client._session = session
        return client

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _runtime(self) -> Runtime:
        return self._session.runtime

    @property
    def _wakeups(self) -> Wakeups:
        return self._session.wakeups

    @property
    def schedules(self) -> Schedules:
        """Jobs that are submitted again and again: add, list, pause, remove."""
        return Schedules(self._runtime)

    @property
    def models(self) -> Models:
        """Registered models: add, list, activate, roll back."""
        return Models(self._runtime.models, person())

    @property
    def keys(self) -> Keys:
        """API keys of the gateway: create, list, revoke, rotate."""
        return Keys(self._runtime, person())

    def on_notice(self, callback: Callable[[str], None]) -> None:
        """Hand what is worth a line (a path that a registered name hides, a download) to ``callback`` from now on."""
        self._session.notify(callback)

    def submit(self, *, start: bool = True, on_notice: Callable[[str], None] | None = None, **fields: Any) -> JobHandle:
        """Validate and queue a job; the fields are those of :class:`~pipeline.JobSpec`.

        Without a broker it is planned here, and runs in the background of this process unless ``start`` is false. With
        one, a worker plans it; what this machine can reach is checked here all the same, and ``on_notice`` hears of
        what it cannot.

        Raises :class:`~storage.errors.InvalidJob` naming the field and the reason; no engine is loaded before that.
        """
        self._session.notify(on_notice)
        embedded = self._runtime.settings.broker_url is None
        job = submit_job(self._runtime, fields, plan=embedded)
        if not embedded:
            self._wakeups.plan()
        elif start and job.state not in TERMINAL_JOB:
            self._session.start(job.id)
        return JobHandle(self._session, job.id)

    def estimate(self, **fields: Any) -> Estimate:
        """What the job would be: rows, bytes and shards, from the footers of its input. Nothing is queued.

        Raises :class:`~storage.errors.InvalidJob` as :meth:`submit` does.
        """
        return estimate(self._runtime, fields)

    def run(
        self,
        *,
        on_progress: Callable[[JobStatus], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        interrupt: Cancellation | None = None,
        **fields: Any,
    ) -> JobStatus:
        """Run a job in the foreground to its end, or go on with the live job that does the same work.

        Returns the final status whatever it is. Raises :class:`~storage.errors.InvalidJob` before anything is loaded,
        and :class:`~storage.errors.Interrupted` after ``interrupt`` fired and everything finished was flushed. What
        ``on_progress`` raises, and Ctrl-C, come out when that is done as well.
        """
        self._session.notify(on_notice)
        job = submit_job(self._runtime, fields, resume=True, plan=True)
        return self._session.run(job, interrupt, None if on_progress is None else own(on_progress))

    def map(self, data: Any, *, progress: bool = False, **fields: Any) -> pa.Table:
        """A model over the rows of a data frame: its columns and the results, in its order, as a ``pyarrow.Table``.

        ``data``: anything with ``__arrow_c_stream__`` or ``__arrow_c_array__`` (a pandas or Polars DataFrame, a DuckDB
        relation, a pyarrow Table or RecordBatchReader), or a ``pyarrow.dataset``. ``fields`` are those of
        :class:`~pipeline.JobSpec`, without input and output. A failed row has its ``error`` filled in, and its result
        columns null. The index of a pandas frame is kept: as columns, which ``to_pandas()`` makes the index again.

        It is the same job as :meth:`submit` makes, over a copy of the rows on disk (``map_dir`` of the settings). After
        a crash or Ctrl-C the same call, with the same rows and fields, goes on and computes no flushed row again; after
        the end it returns the results that are there. Both are deleted when no call has used them for
        ``map_retention_days``.

        Raises :class:`~storage.errors.InvalidInput` for what is no table or has a column name twice, and what
        :meth:`submit` and :meth:`JobHandle.wait` raise.
        """
        runtime = self._runtime
        frame_jobs.refuse(runtime, fields)
        frame = frame_jobs.keep(runtime, data)
        frame_jobs.prune(runtime)
        handle = self._of_frame(frame_jobs.fields_of(runtime, frame, fields))
        if runtime.settings.broker_url is not None:
            handle.wait(progress=progress)
        else:
            handle.finish(progress=progress)
        return frame_jobs.with_index(handle.table(), frame)

    def _of_frame(self, fields: dict[str, Any]) -> JobHandle:
        """The job of this call: an earlier one that can go on, or that is done, else a new one."""
        before = frame_jobs.earlier(self._runtime, fields["output"])
        if before is not None:
            handle = JobHandle(self._session, before.id)
            try:
                handle.retry()
            except Conflict:
                fields = fields | {"overwrite": True}  # nothing is left to go on from
            else:
                return handle
        embedded = self._runtime.settings.broker_url is None
        try:
            job = submit_job(self._runtime, fields, resume=True, plan=embedded)
        except Conflict:
            if "overwrite" in fields or jobs.live_on_output(self._runtime.database, fields["output"]) is not None:
                raise
            # What is there cannot be vouched for: the job that made it is not known any more.
            job = submit_job(self._runtime, fields | {"overwrite": True}, resume=True, plan=embedded)
        if not embedded:
            self._wakeups.plan()
        return JobHandle(self._session, job.id)

    def job(self, id_or_prefix: Text) -> JobHandle:
        """A job by its id, or by an unambiguous beginning or end of it. Raises :class:`~storage.errors.NotFound`."""
        return JobHandle(self._session, job_lookup.find(self._runtime.database, id_or_prefix).id)

    def jobs(
        self,
        state: Text | None = None,
        limit: Limit = 20,
        after: Text | None = None,
        *,
        tenant: Text | None = None,
        output: Text | None = None,
        since: Moment | None = None,
        before: Moment | None = None,
    ) -> list[JobStatus]:
        """Jobs, newest first; ``after`` is the last one of the page before, by its id as :meth:`job` takes it.

        ``output`` narrows them to jobs that write there or below; ``since`` and ``before`` to those submitted at that
        time or later, and earlier than that (Unix seconds, or a ``datetime``). Raises
        :class:`~storage.errors.InvalidJob` for a filter that fits no job at all.
        """
        database = self._runtime.database
        for field, name in (("tenant", tenant), ("output", output)):
            if name == "":
                raise InvalidJob("it is empty, which fits no job; leave it out for the jobs of all", field=field)
        if after is not None and len(after) < _ID_LENGTH:  # a whole one need not be there any more
            after = job_lookup.find(database, after).id
        found = job_lookup.listed(
            database,
            state=None if state is None else state_named(JobState, state),
            tenant=tenant,
            output_uri=None if output is None else locations.normalize(output),
            since=since.timestamp() if isinstance(since, datetime) else since,
            before=before.timestamp() if isinstance(before, datetime) else before,
            limit=limit,
            after=after,
        )
        return with_attendance(self._runtime, found, [job_status(database, job) for job in found])

    def short_ids(self, ids: Sequence[str]) -> dict[str, str]:
        """For each job's id an end of it that :meth:`job` accepts: eight characters, or more where two are alike."""
        return job_lookup.short_ids(self._runtime.database, ids)

    def request(self, job: Text, row: Whole) -> RequestStatus:
        """Where one row of a job stands; ``row`` counts from the start of the job's input, from 0.

        Raises :class:`~storage.errors.NotFound` for a row that the job does not have.
        """
        database = self._runtime.database
        return row_status(self._runtime, job_lookup.find(database, job), row)

    def tenants(self) -> list[Tenant]:
        """Everybody whose jobs these are, by name."""
        return tenants.listed(self._runtime.database)

    def tenant(self, name: Text) -> tuple[Tenant, Usage]:
        """A tenant, and what it uses now. Raises :class:`~storage.errors.NotFound`."""
        return tenants.get(self._runtime.database, name), tenants.usage(self._runtime.database, name)

    def add_tenant(self, name: Text, **values: Any) -> Tenant:
        """Register a tenant; ``values`` are ``weight`` and the limits of :class:`~storage.tenants.tenants.Tenant`."""
        return tenants.add(self._runtime.database, name, **values)

    def set_tenant(self, name: Text, **values: Any) -> Tenant:
        """Change some of a tenant's values; ``None`` lifts a limit. What runs or is queued already is left alone."""
        return tenants.change(self._runtime.database, name, **values)

    def remove_tenant(self, name: Text) -> None:
        """Forget a tenant without live jobs. Its ended jobs stay."""
        tenants.remove(self._runtime.database, name)

    def close(self) -> None:
        """Flush and hand back what runs in the background, end the engines, close the database. Safe to call twice."""
        self._session.close()
