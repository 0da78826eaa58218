"""One job, as its owner holds it in Python."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from pipeline.boundary import Limit, Seconds, Text, Whole, boundary, own
from pipeline.client.failed_rows import FailedRows, row_status
from pipeline.client.progress import progress as shown_progress
from pipeline.client.session import Session
from pipeline.engines.base import Cancellation
from pipeline.jobs import deletion
from pipeline.jobs.control import cancel_job, retry_job
from pipeline.jobs.status_query import job_status
from pipeline.process import metrics, process_end
from pipeline.process.attendance import with_attendance
from pipeline.process.runtime import Runtime
from pipeline.spec.status import JobStatus, RequestStatus
from pipeline.worker import embedded
from storage import locations
from storage.errors import (
    Conflict,
    IllegalTransition,
    InvalidJob,
    JobCancelled,
    JobFailed,
    JobRefused,
    NotFound,
    WaitTimeout,
)
from storage.fleet import reports, workers
from storage.queue import jobs
from storage.records import Attempt, Event, Shard
from storage.states import JobState, ShardState

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds

_POLL_SECONDS = 0.25
S = TypeVar("S", JobState, ShardState)


@boundary
class JobHandle:
    """One job. Every call reads the database anew."""

    def __init__(self, session: Session, job_id: str) -> None:
        self._session = session
        self.id = job_id

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    @property
    def _runtime(self) -> Runtime:
        return self._session.runtime

    def status(self) -> JobStatus:
        """The job at this moment."""
        runtime = self._runtime
        job = jobs.get(runtime.database, self.id)
        return with_attendance(runtime, [job], [job_status(runtime.database, job)])[0]

    def wait(self, timeout: Seconds | None = None, progress: bool = False) -> JobStatus:
        """Block until the job has ended; in the embedded mode this process runs it if no other does.

        Returns the status of a job that completed (perhaps with failed rows). Raises
        :class:`~storage.errors.JobFailed` (:class:`~storage.errors.JobRefused` where planning refused the job),
        :class:`~storage.errors.JobCancelled` (cancelled or expired) or :class:`~storage.errors.WaitTimeout` after
        ``timeout`` seconds. ``progress`` shows on stderr what the commands show, in a Jupyter notebook as a line of the
        cell's output. Ctrl-C ends the waiting; the job goes on in the background as long as the process does.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with shown_progress(quiet=not progress, keep=True) as shown:
            while True:
                status = embedded.with_unflushed(self._runtime, self.status())
                shown.update(status)
                if status.terminal:
                    return completed(status)
                background = self._session.start(self.id)
                left = _POLL_SECONDS if deadline is None else min(_POLL_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    why = f" ({status.message})" if status.message else ""
                    raise WaitTimeout(f"job {self.id} is still {status.state} after {timeout} seconds{why}")
                if background is None:
                    threading.Event().wait(left)
                else:
                    background.done.wait(left)
                    if background.error is not None:
                        process_end.await_signal()
                        raise background.error

    def cancel(self) -> JobStatus:
        """Stop the job; its finished rows are published as partial.

        Harmless when it is being cancelled already, or has ended: the status then says how.
        """
        try:
            cancel_job(self._runtime, self.id)
        except IllegalTransition:
            if not (status := self.status()).terminal:
                raise
            return status
        self._session.wakeups.finalize()
        lease = self._runtime.settings.lease_seconds
        if self._runtime.settings.broker_url is None or not workers.any_alive(self._runtime.database, within=lease):
            embedded.cancel_idle(self._runtime, self.id)
        return self.status()

    def delete(self) -> None:
        """Forget the job, which must have ended: its rows in the database and its work files. What it published stays.

        Its idempotency key is free again, and it cannot be retried any more. Raises :class:`~storage.errors.Conflict`
        for a job that is live.
        """
        deletion.delete_job(self._runtime, self.id)

    def retry(self, failed_only: bool = True, *, on_notice: Callable[[str], None] | None = None) -> JobStatus:
        """Queue the ended job again: its unfinished shards, and its failed rows (or all rows).

        A job that was never planned is checked as :meth:`Client.submit` does; raises
        :class:`~storage.errors.InvalidJob` where it would be refused again.
        """
        self._session.notify(on_notice)
        job = retry_job(self._runtime, self.id, failed_only=failed_only)
        if job.state is JobState.VALIDATING:
            self._session.wakeups.plan()
        elif job.state is JobState.FINALIZING:
            self._session.wakeups.finalize()
        else:
            free = workers.free_slots(self._runtime.database, job.queue)
            self._session.wakeups.run(job.queue, min(job.n_open, free))
        return self.status()

    def resume(
        self,
        *,
        on_progress: Callable[[JobStatus], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        interrupt: Cancellation | None = None,
    ) -> JobStatus:
        """Run the job in the foreground of this process until it has ended, as :meth:`Client.run` does."""
        self._session.notify(on_notice)
        job = jobs.get(self._runtime.database, self.id)
        return self._session.run(job, interrupt, None if on_progress is None else own(on_progress))

    def finish(self, progress: bool = False) -> JobStatus:
        """Run the job in the foreground, or wait for the process that does. Ctrl-C stops it, and it can be resumed.

        Returns, and raises, what :meth:`wait` does.
        """
        with shown_progress(quiet=not progress, keep=True) as shown:
            try:
                return completed(self.resume(on_progress=shown.update))
            except Conflict:
                status = self.status()
                if status.terminal or not status.attended:
                    raise
        return self.wait(progress=progress)

    def request(self, row: Whole) -> RequestStatus:
        """Where one row stands; ``row`` counts from the start of the job's input, from 0.

        Raises :class:`~storage.errors.NotFound` for a row that the job does not have.
        """
        return row_status(self._runtime, jobs.get(self._runtime.database, self.id), row)

    def errors(self, limit: Limit | None = None, *, after: Whole | None = None) -> FailedRows:
        """All failed rows in input order, with codes and messages: a lazy sequence, which reads what is asked for.

        They come from the published output, and from what is flushed while the job runs. ``after``: only rows behind
        this one (the last row of the page before). ``len(job.errors())`` counts without reading;
        ``job.errors(…).total`` counts whatever ``limit`` and ``after`` say.
        """
        jobs.get(self._runtime.database, self.id)  # a job that is gone is said to be now
        return FailedRows(lambda: self._runtime, self.id, after, limit)

    def events(self) -> list[Event]:
        """The audit trail, oldest first."""
        return jobs.events(self._runtime.database, self.id)

    def attempts(self) -> list[Attempt]:
        """Every attempt at every shard."""
        return reports.attempts(self._runtime.database, self.id)

    def measured(self) -> dict[str, float]:
        """What the attempts measured, added up. :func:`pipeline.process.metrics.derived` makes rates of it."""
        return metrics.of_job(reports.measured(self._runtime.database, self.id))

    @property
    def regrouped(self) -> bool:
        """Whether the shards hold rows in another order than the input's (``order="prefix"``)."""
        return bool(jobs.get(self._runtime.database, self.id).plan.get("part_rows"))

    def shards(self, state: Text | None = None) -> list[Shard]:
        """The job's shards in row order; ``state="failed"`` lists those that failed, with their ``error``."""
        wanted = None if state is None else state_named(ShardState, state)
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


def state_named(kind: type[S], name: str) -> S:
    """The state of this name, or :class:`InvalidJob`."""
    try:
        return kind(name)
    except ValueError:
        raise InvalidJob(f"no such state {name!r}; one of {', '.join(kind)}", field="state") from None


def completed(status: JobStatus) -> JobStatus:
    """The status of a job that has completed; otherwise :class:`JobFailed` or :class:`JobCancelled`."""
    if status.state is JobState.FAILED:
        kind, verb = (JobRefused, "was refused") if status.refused else (JobFailed, "failed")
        raise kind(f"job {status.id} {verb}: {status.error}")
    if status.state is not JobState.COMPLETED:
        done = f"{status.rows_done} of {status.rows_total} rows are done"
        raise JobCancelled(f"job {status.id} was {status.state}: {done}")
    return status
