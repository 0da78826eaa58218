"""Keeps this process's leases alive, and tells its attempts when to stop.

One thread per process renews every lease in one statement, so that a worker costs the database the same however many
shards it runs. A planner's or publisher's lease of one job is renewed by :func:`lease_renewer`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from pipeline.engines.base import Cancellation
from storage.errors import CommitUnknown, IllegalTransition, LeaseLost, TransientError
from storage.fleet import workers
from storage.log_actions import Action
from storage.logs import get_logger, thread_with_ids
from storage.queue import claims
from storage.queue.claims import Lease
from storage.records import Claim
from storage.sql.database import Database

log = get_logger(__name__)

LEASE_LOST = "the lease was lost"
JOB_STOPPING = "the job is being wound down"
INTERRUPTED = "interrupted"
WATCH_SECONDS = 0.5
"""How often a worker that others may tell to stop looks whether they have: a read of a row, between heartbeats."""


class LeaseKeeper:
    """A context manager: the thread runs inside it.

    ``tick`` is called after each round (embedded maintenance). ``alive`` says, each round, that the worker lives. With
    ``watch_seconds`` it looks in between, while attempts run, whether their jobs are being wound down.
    """

    def __init__(
        self,
        database: Database,
        *,
        worker_id: str,
        lease_seconds: float,
        heartbeat_seconds: float | None = None,
        tick: Callable[[], object] | None = None,
        alive: Callable[[], object] | None = None,
        watch_seconds: float | None = None,
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._pause = heartbeat_seconds if heartbeat_seconds is not None else lease_seconds / 3
        self._watch = self._pause if watch_seconds is None else min(self._pause, watch_seconds)
        self._tick = tick
        self._alive = alive or (lambda: workers.touch(database, worker_id))
        self._lock = threading.Lock()
        self._held: dict[tuple[str, int], Cancellation] = {}
        self._jobs: dict[tuple[str, int], str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rowmill-leases", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def register(self, claim: Claim) -> Cancellation:
        """Keep this claim's lease from now on. The cancellation fires when the attempt has to stop."""
        cancellation = Cancellation()
        with self._lock:
            self._held[claim.shard.id, claim.attempt_no] = cancellation
            self._jobs[claim.shard.id, claim.attempt_no] = claim.job.id
        return cancellation

    def unregister(self, claim: Claim) -> None:
        """The attempt has ended."""
        with self._lock:
            self._held.pop((claim.shard.id, claim.attempt_no), None)
            self._jobs.pop((claim.shard.id, claim.attempt_no), None)

    def stop_all(self, reason: str) -> None:
        """Stop every attempt of this process, for ``reason``."""
        with self._lock:
            held = list(self._held.values())
        for cancellation in held:
            cancellation.cancel(reason)

    def heartbeat(self) -> None:
        """One round: renew, and stop what has to stop."""
        with self._lock:
            held = dict(self._held)
        found = claims.heartbeat(self._database, list(held), owner=self._worker_id, lease_seconds=self._lease_seconds)
        for key, lease in found.items():
            with self._lock:
                still_held = key in self._held
            if lease is Lease.LOST and still_held:
                held[key].cancel(LEASE_LOST)
            elif lease is Lease.STOPPING:
                held[key].cancel(JOB_STOPPING)
        self._alive()

    def poll_cancellation(self) -> None:
        """Stop the attempts whose jobs are being wound down."""
        with self._lock:
            held, jobs = dict(self._held), dict(self._jobs)
        if not held:
            return
        stopping = claims.stopping(self._database, set(jobs.values()))
        for key, cancellation in held.items():
            if jobs[key] in stopping:
                cancellation.cancel(JOB_STOPPING)

    def _run(self) -> None:
        due = time.monotonic() + self._pause
        while not self._stop.wait(self._watch):
            try:
                if self._watch < self._pause and time.monotonic() < due:
                    self.poll_cancellation()
                    continue
                due = time.monotonic() + self._pause
                self.heartbeat()
                if self._tick is not None:
                    self._tick()
            except (TransientError, CommitUnknown) as error:
                # The leases may run out meanwhile. That costs work at worst, never correctness: every write is fenced.
                log.warning(
                    "heartbeat failed, trying again: %s", error, action=Action.HEARTBEAT_FAILED, worker=self._worker_id
                )
            except Exception:
                # A thread that died here would let every lease of the process run out, for whatever reason.
                log.exception("heartbeat failed, trying again", action=Action.HEARTBEAT_FAILED, worker=self._worker_id)


@contextmanager
def lease_renewer(renew: Callable[[], object], *, lease_seconds: float, whose: str) -> Iterator[None]:
    """Call ``renew`` three times per lease. One that raises :class:`LeaseLost` is the last (or
    :class:`IllegalTransition`: there is nothing to hold any more); other errors are logged."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(lease_seconds / 3):
            try:
                renew()
            except (LeaseLost, IllegalTransition):
                return
            except Exception as error:
                text = "the lease of %s could not be renewed, trying again: %s"
                log.warning(text, whose, error, action=Action.LEASE_RENEWAL_FAILED)

    thread = thread_with_ids("rowmill-renewer", keep)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
