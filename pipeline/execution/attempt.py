"""One attempt at a claimed shard, and what its outcome means for the shard and the job."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec

from pipeline.engines.base import Cancellation
from pipeline.engines.pool import LeaseCancelled
from pipeline.execution.attempt_context import AttemptContext
from pipeline.execution.run_shard import run_shard
from pipeline.process.heartbeat import LeaseKeeper
from pipeline.process.metrics import Measures
from pipeline.process.runtime import Runtime
from storage import failpoints
from storage.deaths import CAREFUL_AFTER
from storage.errors import (
    Blame,
    CommitUnknown,
    EngineDead,
    InputChanged,
    InvalidJob,
    LeaseLost,
    RowmillError,
    TransientError,
)
from storage.log_actions import Action
from storage.logs import bound, get_logger
from storage.queue import attempts
from storage.records import LONGEST_BACKOFF_SECONDS, Claim
from storage.redaction import redact_text
from storage.sql.database import Database
from storage.sql.retry import retry_write

P = ParamSpec("P")

log = get_logger(__name__)


class _DiedRunning(EngineDead):
    """The engine died under rows (not while it was loaded): one of them may be the cause."""


class _DiedUnderOthers(EngineDead):
    """The engine died while no row of this shard was in it, or was closed on purpose."""


def attempt_ids(runtime: Runtime, claim: Claim) -> dict[str, Any]:
    """What the log's records of an attempt carry."""
    return {
        "tenant": claim.job.tenant,
        "job_id": claim.job.id,
        "shard_id": claim.shard.id,
        "shard": claim.shard.idx,
        "attempt": claim.attempt_no,
        "worker": runtime.worker.id,
    }


def execute(
    runtime: Runtime, claim: Claim, keeper: LeaseKeeper, interrupt: Cancellation, *, others: bool = False
) -> bool:
    """Take a claimed shard to the end of its attempt, whatever happens: committed, failed, released or cancelled.

    Nothing is raised: every outcome is in the database. ``others``: there may be other workers, so what may be wrong
    with this one alone (``RowmillError.retry_on_other_worker``) fails the attempt, and the job only when the shard's
    budget is spent. Returns whether this worker is fit for such a shard, as far as this attempt can say.
    """
    with bound(**attempt_ids(runtime, claim)):
        return _execute(runtime, claim, keeper, interrupt, others=others)


def _execute(runtime: Runtime, claim: Claim, keeper: LeaseKeeper, interrupt: Cancellation, *, others: bool) -> bool:
    fit = True
    measures = Measures()
    failpoints.hit("claim.taken")
    cancel = keeper.register(claim)
    forget = interrupt.on_cancel(lambda: cancel.cancel(interrupt.reason or "interrupted"))
    try:
        _run(runtime, claim, cancel, measures)
    except LeaseLost as lost:
        log.warning("%s", lost, action=Action.LEASE_LOST)
        with suppress(TransientError, CommitUnknown):
            attempts.supersede(runtime.database, claim)
    except _DiedUnderOthers as error:
        _release(runtime, claim, str(error), measures)
    except (InputChanged, InvalidJob) as error:
        fit = not error.retry_on_other_worker
        spent = claim.shard.n_fail + 1 >= runtime.settings.max_failures
        if fit or spent or not others:
            _report(runtime, claim, attempts.fail_job, str(error), stats=measures.so_far())
        else:
            _fail(runtime, claim, str(error), measures)
    except BaseException as error:
        # Of any kind: SystemExit of a model's code, or a panic of a Rust library, would end this thread in silence.
        fit = not getattr(error, "retry_on_other_worker", False)
        # Not swallowed: it is the attempt's recorded error, and costs one failure of the shard's budget.
        if not isinstance(error, RowmillError):
            log.exception(
                "attempt %d of shard %s failed", claim.attempt_no, claim.shard.id, action=Action.ATTEMPT_FAILED
            )
        text = str(error) if isinstance(error, RowmillError) else _last_line(error)
        if interrupt.cancelled:
            # During shutdown any error may be a side effect, so it costs no budget; a real fault will show again in the
            # next attempt.
            _release(runtime, claim, text, measures)
        else:
            _fail(runtime, claim, text, measures, crash=isinstance(error, _DiedRunning))
    finally:
        forget()
        keeper.unregister(claim)
    return fit


def _release(runtime: Runtime, claim: Claim, error: str, measures: Measures) -> None:
    text = "shard %s is handed back, and is not counted as failed: %s"
    log.warning(text, claim.shard.id, error, action=Action.ATTEMPT_RELEASED)
    _report(runtime, claim, attempts.release, stats=measures.so_far(), error=error)


def _fail(runtime: Runtime, claim: Claim, error: str, measures: Measures, *, crash: bool = False) -> None:
    # A search for a poison row is not a pile-up on something busy: it goes on at once.
    searching = crash and claim.shard.n_crash + 1 >= CAREFUL_AFTER
    _report(
        runtime,
        claim,
        attempts.fail,
        error,
        delay=0.0 if searching else _backoff(claim.shard.n_fail + 1),
        max_failures=runtime.settings.max_failures,
        max_losses=runtime.settings.max_losses,
        crash=crash,
        stats=measures.so_far(),
    )


def _backoff(failures: int) -> float:
    """Seconds to wait after the ``failures``-th failure (1 is the first): exponential, with a cap.

    Spread over the upper half at random, so that shards that failed together do not come back together.
    """
    return min(LONGEST_BACKOFF_SECONDS, 2.0 ** min(failures - 1, 60)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def _report(
    runtime: Runtime,
    claim: Claim,
    write: Callable[Concatenate[Database, Claim, P], object],
    *args: P.args,
    **kwargs: P.kwargs,
) -> None:
    """Record how an attempt ended. If that cannot be done, the lease runs out and the reaper records it as lost."""
    try:
        retry_write(lambda: write(runtime.database, claim, *args, **kwargs))
    except (LeaseLost, CommitUnknown, TransientError) as error:
        log.warning("the end of an attempt could not be recorded: %s", error, action=Action.ATTEMPT_UNRECORDED)


def _last_line(error: BaseException) -> str:
    return redact_text(traceback.format_exception_only(error)[-1].strip())


def _run(runtime: Runtime, claim: Claim, cancel: Cancellation, measures: Measures) -> None:
    attempt = AttemptContext.open(runtime, claim, cancel, measures)
    spec, began = attempt.spec, time.monotonic()
    try:
        with runtime.engines.lease(claim.job.engine, attempt.model, spec.task, spec.engine_options, cancel) as engine:
            measures.begin(load_seconds=time.monotonic() - began)
            try:
                run_shard(attempt, engine)
            except EngineDead as error:
                runtime.engines.discard(engine)
                match error.blame:
                    case Blame.OWN:
                        raise _DiedRunning(str(error)) from error
                    case Blame.OTHERS:
                        raise _DiedUnderOthers(str(error)) from error
                raise
    except LeaseCancelled:
        attempt.hand_back({})
