"""What the planning of one job holds, and the planner's lease, kept while a long part of it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pipeline.engines.base import Cancellation
from pipeline.planning.repartition import Limits
from pipeline.process.runtime import Runtime
from pipeline.spec.job_spec import JobSpec, stored
from storage import locations
from storage.errors import CommitUnknown, Interrupted, TransientError
from storage.queue import plan_leases
from storage.records import Job
from storage.sql.retry import retry_write


@dataclass(frozen=True, slots=True)
class PlanContext:
    """One job that is planned by this process. ``interrupt`` ends a long plan early.

    ``owner`` is who holds the planner's lease already; without one, a lease of its own is taken where it is needed.
    """

    runtime: Runtime
    job: Job
    spec: JobSpec
    interrupt: Cancellation | None = None
    owner: str | None = None

    @classmethod
    def of(
        cls, runtime: Runtime, job: Job, interrupt: Cancellation | None = None, owner: str | None = None
    ) -> PlanContext:
        """With the job's stored spec. Raises :class:`InvalidJob` for one that this version cannot read."""
        return cls(runtime, job, stored(job.spec), interrupt, owner)

    @property
    def work_dir(self) -> str:
        """The folder that the job's chunks lie in."""
        return locations.work_dir(self.spec.output, self.job.id)

    @property
    def limits(self) -> Limits:
        """For copying the job's rows into another order."""
        return limits_of(self.runtime)

    @contextmanager
    def lease(self, doing: str) -> Iterator[Callable[[], None]]:
        """Hold the planner's lease inside the block, which has to call often what it is given.

        Those calls renew the lease. They raise :class:`~storage.errors.LeaseLost` when another planner has it,
        :class:`~storage.errors.IllegalTransition` when the job no longer waits for its plan, and :class:`Interrupted`,
        naming what was ``doing``, when ``interrupt`` fires. An error frees the lease.
        """
        runtime, job = self.runtime, self.job
        # Of its own, not the worker's: two threads of one worker may plan.
        owner = self.owner or plan_leases.owner_of(runtime.worker.id)
        seconds, renew_at = runtime.settings.lease_seconds, 0.0

        def going_on() -> None:
            nonlocal renew_at
            if self.interrupt is not None and self.interrupt.cancelled:
                raise Interrupted(f"job {job.id} was interrupted while {doing}; nothing was run yet")
            if time.monotonic() >= renew_at:
                retry_write(lambda: plan_leases.hold(runtime.database, job.id, owner=owner, lease_seconds=seconds))
                renew_at = time.monotonic() + seconds / 3

        going_on()
        try:
            yield going_on
        except BaseException:
            with suppress(TransientError, CommitUnknown):
                plan_leases.release(runtime.database, owner)
            raise


def limits_of(runtime: Runtime) -> Limits:
    """The limits for copying a job's rows into another order, by the settings of this process."""
    settings = runtime.settings
    return Limits(
        partition_rows=settings.order_rows,
        n_bytes=settings.order_bytes // 4,
        batch_rows=settings.read_batch_rows,
        batch_bytes=settings.read_batch_bytes,
    )
