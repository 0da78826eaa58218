"""The Python face of Rowmill: submit jobs, follow them, read their output.

>>> from pipeline import Client
>>> client = Client()
>>> job = client.submit(input="texts.parquet", output="out", model="minilm/", task="embed", column="text")
>>> job.wait()
>>> job.table()
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline import deletion, local, maintenance, measures
from pipeline import job as job_calls
from pipeline.engines.base import Cancellation
from pipeline.leases import INTERRUPTED
from pipeline.progress import shown
from pipeline.runtime import Runtime, start
from pipeline.schedules import Schedules
from pipeline.settings import Settings
from pipeline.status import JobStatus, RequestStatus
from pipeline.status_of import job_status, request_status
from storage import job_lookup, jobs, locations, reports, tenants, workers
from storage.errors import (
    IllegalTransition,
    InvalidJob,
    JobCancelled,
    JobFailed,
    NotFound,
    WaitTimeout,
)
from storage.records import Attempt, Event, RowException, Shard
from storage.states import TERMINAL_JOB, JobState, ShardState
from storage.tenants import Tenant, Usage
from storage.wakeups import Wakeups

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds

_POLL_SECONDS = 0.25
_ID_LENGTH = 36
S = TypeVar("S", JobState, ShardState)


class Client:
    """Jobs in the database that the settings name.

    Without a broker (the embedded default) a submitted job runs in a background thread of this process; when the
    process ends first, what is finished is flushed, and the next ``wait`` on the job, in any process, goes on from it.
    """

    def __init__(self, *, settings: Settings | None = None) -> None:
        self._notice: Callable[[str], None] = lambda message: None
        self._runtime = start(settings or Settings(), lambda message: self._notice(message))
        self._wakeups = Wakeups(self._runtime.settings.broker_url)
        self._running: dict[str, _Background] = {}
        atexit.register(self.close)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def schedules(self) -> Schedules:
        """Jobs that are submitted again and again: add, list, pause, remove."""
        return Schedules(self._runtime)

    def submit(self, *, start: bool = True, **fields: Any) -> JobHandle:
        """Validate and queue a job; the fields are those of :class:`~pipeline.JobSpec`.

        Without a broker it is planned here, and runs in the background of this process unless ``start`` is false.

        Raises :class:`~storage.errors.InvalidJob` naming the field and the reason; no engine is loaded before that.
        """
        embedded = self._runtime.settings.broker_url is None
        job = job_calls.submit_job(self._runtime, fields, plan=embedded)
        if not embedded:
            self._wakeups.plan()
        elif start and job.state not in TERMINAL_JOB:
            self._start(job.id)
        return JobHandle(self, job.id)

    def estimate(self, **fields: Any) -> job_calls.Estimate:
        """What the job would be: rows, bytes and shards, from the footers of its input. Nothing is queued.

        Raises :class:`~storage.errors.InvalidJob` as :meth:`submit` does.
        """
        return job_calls.estimate(self._runtime, fields)

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
        and :class:`~storage.errors.Interrupted` after ``interrupt`` fired and everything finished was flushed.
        """
        if on_notice is not None:
            self._notice = on_notice
        job = job_calls.submit_job(self._runtime, fields, resume=True, plan=True)
        return local.run_job(
            self._runtime,
            job,
            interrupt=interrupt or Cancellation(),
            on_progress=on_progress or (lambda status: None),
        )

    def job(self, id_or_prefix: str) -> JobHandle:
        """A job by its id, or by an unambiguous beginning or end of it. Raises :class:`~storage.errors.NotFound`."""
        return JobHandle(self, job_lookup.find(self._runtime.database, id_or_prefix).id)

    def jobs(
        self,
        state: str | None = None,
        limit: int = 20,
        after: str | None = None,
        *,
        tenant: str | None = None,
        output: str | None = None,
        since: float | datetime | None = None,
        before: float | datetime | None = None,
    ) -> list[JobStatus]:
        """Jobs, newest first; ``after`` is the last one of the page before, by its id as :meth:`job` takes it.

        ``output`` narrows them to jobs that write there or below; ``since`` and ``before`` to those submitted at that
        time or later, and earlier than that (Unix seconds, or a ``datetime``).
        """
        database = self._runtime.database
        if after is not None and len(after) < _ID_LENGTH:  # a whole one need not be there any more
            after = job_lookup.find(database, after).id
        found = job_lookup.listed(
            database,
            state=None if state is None else _state(JobState, state),
            tenant=tenant,
            output_uri=None if output is None else locations.normalize(output),
            since=since.timestamp() if isinstance(since, datetime) else since,
            before=before.timestamp() if isinstance(before, datetime) else before,
            limit=limit,
            after=after,
        )
        return [job_status(database, job) for job in found]

    def short_ids(self, ids: Sequence[str]) -> dict[str, str]:
        """For each job's id an end of it that :meth:`job` accepts: eight characters, or more where two are alike."""
        return job_lookup.short_ids(self._runtime.database, ids)

    def request(self, job: str, row: int) -> RequestStatus:
        """Where one row of a job stands; ``row`` counts from the start of the job's input."""
        database = self._runtime.database
        return request_status(database, job_lookup.find(database, job), row)

    def tenants(self) -> list[Tenant]:
        """Everybody whose jobs these are, by name."""
        return tenants.listed(self._runtime.database)

    def tenant(self, name: str) -> tuple[Tenant, Usage]:
        """A tenant, and what it uses now. Raises :class:`~storage.errors.NotFound`."""
        return tenants.get(self._runtime.database, name), tenants.usage(self._runtime.database, name)

    def add_tenant(self, name: str, **values: Any) -> Tenant:
        """Register a tenant; ``values`` are ``weight`` and the limits of :class:`~storage.tenants.Tenant`."""
        return tenants.add(self._runtime.database, name, **values)

    def set_tenant(self, name: str, **values: Any) -> Tenant:
        """Change some of a tenant's values; ``None`` lifts a limit. What runs or is queued already is left alone."""
        return tenants.change(self._runtime.database, name, **values)

    def remove_tenant(self, name: str) -> None:
        """Forget a tenant without live jobs. Its ended jobs stay."""
        tenants.remove(self._runtime.database, name)

    def close(self) -> None:
        """Flush and hand back what runs in the background, end the engines, close the database. Safe to call twice."""
        atexit.unregister(self.close)
        for background in self._running.values():
            background.interrupt.cancel(INTERRUPTED)
        for background in self._running.values():
            background.join()
        self._running.clear()
        self._runtime.close()

    def _start(self, job_id: str) -> _Background | None:
        """Run the job in the background, if it is this process's to run."""
        running = self._running.get(job_id)
        if running is not None and running.is_alive():
            return running
        if self._runtime.settings.broker_url is not None:
            return None
        maintenance.recover_local(self._runtime)
        if workers.holding(self._runtime.database, job_id):
            return None
        background = self._running[job_id] = _Background(self._runtime, job_id)
        background.start()
        return background


class JobHandle:
    """One job. Every call reads the database anew."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    @property
    def _runtime(self) -> Runtime:
        return self._client._runtime

    def status(self) -> JobStatus:
        """The job at this moment."""
        return job_status(self._runtime.database, jobs.get(self._runtime.database, self.id))

    def wait(self, timeout: float | None = None, progress: bool = False) -> JobStatus:
        """Block until the job has ended; in the embedded mode this process runs it if no other does.

        Returns the status of a job that completed (perhaps with failed rows). Raises
        :class:`~storage.errors.JobFailed`, :class:`~storage.errors.JobCancelled` (cancelled or expired) or
        :class:`~storage.errors.WaitTimeout` after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with shown(progress) as show:
            while True:
                status = self.status()
                show(status)
                if status.terminal:
                    return _completed(status)
                background = self._client._start(self.id)
                left = _POLL_SECONDS if deadline is None else min(_POLL_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    raise WaitTimeout(f"job {self.id} is still {status.state} after {timeout} seconds")
                if background is None:
                    threading.Event().wait(left)
                else:
                    background.join(left)
                    if background.error is not None:
                        raise background.error

    def cancel(self) -> JobStatus:
        """Stop the job; its finished rows are published as partial.

        Harmless when it is being cancelled already, or has ended: the status then says how.
        """
        try:
            job_calls.cancel_job(self._runtime, self.id)
        except IllegalTransition:
            if not (status := self.status()).terminal:
                raise
            return status
        self._client._wakeups.finalize()
        lease = self._runtime.settings.lease_seconds
        if self._runtime.settings.broker_url is None or not workers.any_alive(self._runtime.database, within=lease):
            local.cancel_idle(self._runtime, self.id)
        return self.status()

    def delete(self) -> None:
        """Forget the job, which must have ended: its rows in the database and its work files. What it published stays.

        Its idempotency key is free again, and it cannot be retried any more. Raises :class:`~storage.errors.Conflict`
        for a job that is live.
        """
        deletion.delete_job(self._runtime, self.id)

    def retry(self, failed_only: bool = True) -> JobStatus:
        """Queue the ended job again: its unfinished shards, and its failed rows (or all rows)."""
        job = job_calls.retry_job(self._runtime, self.id, failed_only=failed_only)
        if job.state is JobState.VALIDATING:
            self._client._wakeups.plan()
        else:
            free = workers.free_slots(self._runtime.database, job.queue)
            self._client._wakeups.run(job.queue, min(job.n_open, free))
        return self.status()

    def resume(
        self,
        *,
        on_progress: Callable[[JobStatus], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        interrupt: Cancellation | None = None,
    ) -> JobStatus:
        """Run the job in the foreground of this process until it has ended, as :meth:`Client.run` does."""
        if on_notice is not None:
            self._client._notice = on_notice
        return local.run_job(
            self._runtime,
            jobs.get(self._runtime.database, self.id),
            interrupt=interrupt or Cancellation(),
            on_progress=on_progress or (lambda status: None),
        )

    def errors(self, limit: int | None = None) -> Iterator[RowException]:
        """Failed rows in input order: the first hundred of each shard (all of them are in the output's ``error``)."""
        return reports.row_exceptions(self._runtime.database, self.id, limit=limit)

    def events(self) -> list[Event]:
        """The audit trail, oldest first."""
        return jobs.events(self._runtime.database, self.id)

    def attempts(self) -> list[Attempt]:
        """Every attempt at every shard."""
        return reports.attempts(self._runtime.database, self.id)

    def measured(self) -> dict[str, float]:
        """What the attempts measured, added up; :func:`pipeline.measures.derived` makes rates and shares of it."""
        return measures.of_job(reports.measured(self._runtime.database, self.id))

    @property
    def regrouped(self) -> bool:
        """Whether the shards hold rows in another order than the input's (``order="prefix"``)."""
        return bool(jobs.get(self._runtime.database, self.id).plan.get("part_rows"))

    def shards(self, state: str | None = None) -> list[Shard]:
        """The job's shards in row order; ``state="failed"`` lists those that were given up, with their ``error``."""
        wanted = None if state is None else _state(ShardState, state)
        return reports.shards(self._runtime.database, self.id, state=wanted)

    def dataset(self) -> ds.Dataset:
        """The published output, read lazily. Raises :class:`~storage.errors.NotFound` before it is published."""
        import pyarrow.dataset as ds

        output = jobs.get(self._runtime.database, self.id).output_uri
        store = self._runtime.store
        files = [item.uri for item in store.find(f"{locations.data_dir(output)}/*.parquet")]
        if not files or not self.status().terminal:
            raise NotFound(f"job {self.id} has not published any output at {output} yet")
        filesystem, paths = store.arrow_filesystem(files)
        return ds.dataset(paths, format="parquet", filesystem=filesystem)

    def table(self) -> pa.Table:
        """The published output, in memory, in input order."""
        return self.dataset().to_table()


class _Background(threading.Thread):
    def __init__(self, runtime: Runtime, job_id: str) -> None:
        super().__init__(name=f"rowmill-job-{job_id[:8]}", daemon=True)
        self._runtime, self._job_id = runtime, job_id
        self.interrupt = Cancellation()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            job = jobs.get(self._runtime.database, self._job_id)
            local.run_job(self._runtime, job, interrupt=self.interrupt)
        except BaseException as error:
            self.error = error


def _state(kind: type[S], name: str) -> S:
    try:
        return kind(name)
    except ValueError:
        raise InvalidJob(f"no such state {name!r}; one of {', '.join(kind)}", field="state") from None


def _completed(status: JobStatus) -> JobStatus:
    if status.state is JobState.FAILED:
        raise JobFailed(f"job {status.id} failed: {status.error}")
    if status.state is not JobState.COMPLETED:
        done = f"{status.rows_done} of {status.rows_total} rows are done"
        raise JobCancelled(f"job {status.id} was {status.state}: {done}")
    return status
