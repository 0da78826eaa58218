"""The planner's lease, held while a long part of planning goes on in one thread."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipeline.engines.base import Cancellation
from pipeline.process.runtime import Runtime
from storage.errors import CommitUnknown, Interrupted, TransientError
from storage.queue import plan_leases
from storage.records import Job
from storage.sql.retry import retry_write


@contextmanager
def held(
    runtime: Runtime, job: Job, interrupt: Cancellation | None, owner: str | None, doing: str
) -> Iterator[Callable[[], None]]:
    """Hold the lease inside the block, which has to call often what it is given.

    Those calls renew the lease. They raise :class:`~storage.errors.LeaseLost` when another planner has it,
    :class:`~storage.errors.IllegalTransition` when the job waits for its plan no more, and :class:`Interrupted`, naming
    what was ``doing``, when ``interrupt`` fires. ``owner`` is who holds the lease already. An error frees it.
    """
    # Of its own, not the worker's: two threads of one worker may plan.
    owner = owner or f"{runtime.worker.id}#{secrets.token_hex(4)}"
    lease, renew_at = runtime.settings.lease_seconds, 0.0

    def going_on() -> None:
        nonlocal renew_at
        if interrupt is not None and interrupt.cancelled:
            raise Interrupted(f"job {job.id} was interrupted while {doing}; nothing was run yet")
        if time.monotonic() >= renew_at:
            retry_write(lambda: plan_leases.hold(runtime.database, job.id, owner=owner, lease_seconds=lease))
            renew_at = time.monotonic() + lease / 3

    going_on()
    try:
        yield going_on
    except BaseException:
        with suppress(TransientError, CommitUnknown):
            plan_leases.let_go(runtime.database, [owner])
        raise
