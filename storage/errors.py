"""Every error Rowmill raises on purpose. Classified by type, never by the text of a message.

::

    RowmillError
    ├── InvalidJob            the user's request cannot be run as it stands         (exit 2)
    │   ├── InvalidInput      … because of an input file: unreadable, missing column
    │   ├── InvalidModel      … because of the model: not found, wrong task
    │   ├── EngineMissing     … because the engine is not installed or cannot run here
    │   ├── Conflict          … because something else holds the output or the key
    │   └── QuotaExceeded     … because its tenant has used up what it may           (exit 8)
    ├── InvalidSettings       a flag, environment variable or file holds a bad value (exit 2)
    ├── NotFound              no such job, row, model, tenant, schedule             (exit 6)
    ├── IllegalTransition     a state may not follow another; nothing was changed
    ├── ActivationRefused     a model's revision is not proved, or another became active meanwhile
    ├── RowError              one row cannot be computed: recorded, the shard goes on
    ├── TransientError        try again later: costs one failure of the shard's budget
    │   ├── Unreachable       database, broker or object store do not answer        (exit 7)
    │   ├── StorageFull       no space left, or the quota is used up; nothing was left behind
    │   └── EngineDead        the engine's process is gone: rebuild it, then retry
    ├── InputChanged          an input file is not the one that was planned: the job fails
    ├── CorruptFile           a file is not what was written: never committed
    ├── CorruptDatabase       the SQLite file does not hold what was written to it
    ├── LeaseLost             another attempt may own the shard: stop, write nothing
    ├── CommitUnknown         the connection broke during COMMIT: re-read, delete nothing
    ├── JobFailed             raised by waiting on a job that failed                (exit 3)
    │   └── JobRefused        … since planning found that it cannot run             (exit 2)
    ├── JobCancelled          raised by waiting on a job that was cancelled         (exit 5)
    ├── Interrupted           stopped by the user, everything finished is flushed   (exit 5)
    ├── WaitTimeout           the job was still going when the wait ended           (exit 124)
    └── Unexpected            raised by the client where nothing of this tree fits
"""

from __future__ import annotations

from enum import Enum

from storage.redaction import redact_text


class RowmillError(Exception):
    """Base of the tree. ``exit_code`` is what the command line ends with.

    ``retry_on_other_worker``: what is wrong may be this worker's alone (an engine or a model that is missing here, a
    permission, a clock), so that another one may succeed.
    """

    exit_code = 1
    retry_on_other_worker = False

    def __init__(self, *args: object) -> None:
        # Here, so that no message that is shown, logged or stored holds a secret.
        super().__init__(*(redact_text(arg) if isinstance(arg, str) else arg for arg in args))


class InvalidJob(RowmillError):
    """The request cannot be run as it stands.

    ``field`` names the part of the job at fault (``"sampling.max_tokens"``), or is ``None``.
    """

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.message = redact_text(message)


class InvalidInput(InvalidJob):
    """An input file is unreadable, or lacks a column that the job needs."""


class InvalidModel(InvalidJob):
    """The model is not there, is damaged, or cannot do the task."""

    retry_on_other_worker = True


class EngineMissing(InvalidJob):
    """The engine that the job needs is not installed, or does not run on this machine."""

    retry_on_other_worker = True


class Conflict(InvalidJob):
    """The output, or the idempotency key, belongs to something else."""


class QuotaExceeded(InvalidJob):
    """The tenant has used up one of its quotas; nothing of the job was queued.

    ``quota`` is ``"max_jobs"``, ``"rows_per_day"`` or ``"tokens_per_day"``. ``used`` counts what it has without this
    job, ``asked`` what the job would add (0: not known yet), ``resets_at`` is in Unix seconds, or ``None`` where time
    alone does not help.
    """

    exit_code = 8

    def __init__(
        self, tenant: str, quota: str, *, used: int, limit: int, asked: int = 0, resets_at: float | None = None
    ) -> None:
        what, when = _QUOTAS[quota]
        more = f" and the job would add {asked:,}" if asked else ""
        super().__init__(f"tenant {tenant!r} has {used:,} {what} of the {limit:,} it may{more}; {when}")
        self.tenant, self.quota, self.used, self.limit, self.asked = tenant, quota, used, limit, asked
        self.resets_at = resets_at


_QUOTAS = {
    "max_jobs": ("live jobs", "wait for one to end, or cancel one"),
    "rows_per_day": ("rows today", "the count begins anew at 00:00 UTC"),
    "tokens_per_day": ("tokens today", "the count begins anew at 00:00 UTC"),
}


class InvalidSettings(RowmillError):
    """A setting cannot be used. ``field`` names it; ``source`` says where the bad value stands, if that is known."""

    exit_code = 2

    def __init__(self, reason: str, *, field: str | None = None, source: str | None = None) -> None:
        where = f" (from {source})" if source else ""
        super().__init__(f"setting {field}: {reason}{where}" if field else f"{reason}{where}")
        self.field, self.source, self.reason = field, source, redact_text(reason)


class NotFound(RowmillError):
    """No such job, row, model, tenant or schedule (or it is another tenant's)."""

    exit_code = 6


class IllegalTransition(RowmillError):
    """A state that may not follow another was asked for. Nothing was changed."""

    def __init__(self, entity: str, source: str, target: str, detail: str = "") -> None:
        super().__init__(f"a {entity} that is {source} cannot become {target}" + (f": {detail}" if detail else ""))
        self.entity, self.source, self.target = entity, source, target


class ActivationRefused(RowmillError):
    """A revision of a model was not made active: it is not proved, or another one is. Nothing was changed."""


class RowError(RowmillError):
    """One row cannot be computed. ``code`` is stable (see ``pipeline.spec.error_codes``)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = redact_text(message)


class TransientError(RowmillError):
    """Something that may pass: try again later."""


class Unreachable(TransientError):
    """The database, the broker or the object store does not answer."""

    exit_code = 7


class StorageFull(TransientError):
    """There is no space left where a file was to be written (or the quota is used up). Nothing was left behind."""


class Blame(Enum):
    """Whose rows may be the cause of an engine's death, as far as one call of it can say."""

    OWN = "own"
    """Rows of this call were inside the engine when it died."""
    OTHERS = "others"
    """Only rows of other calls were; or the engine was closed on purpose."""
    NOBODY = "nobody"
    """No row was inside."""


class EngineDead(TransientError):
    """The engine's process is gone. It has to be rebuilt before the retry.

    ``blame`` says whether a row of the call that it is raised in may have killed it.
    """

    def __init__(self, message: str, *, blame: Blame = Blame.OWN) -> None:
        super().__init__(message)
        self.blame = blame


class InputChanged(RowmillError):
    """An input file is not the one that was planned. The job fails rather than mix two versions."""


class CorruptFile(RowmillError):
    """A file does not hold what was written to it."""


class CorruptDatabase(RowmillError):
    """The file of the embedded database does not hold what was written to it: a damaged disk, or another program."""

    def __init__(self, file: str, reason: str = "it cannot be read") -> None:
        super().__init__(
            f"the database file {file} is damaged, or is none of Rowmill's ({reason}); restore it from a backup, "
            "or move it away with its -wal and -shm files and submit the jobs again: outputs are not touched"
        )


class LeaseLost(RowmillError):
    """The shard may belong to another attempt by now: stop, and write nothing."""


class CommitUnknown(RowmillError):
    """The connection broke during COMMIT, and reading again did not settle it. Nothing is deleted."""


class JobFailed(RowmillError):
    """The job that was waited for has failed."""

    exit_code = 3


class JobRefused(JobFailed):
    """The job that was waited for was refused when a worker planned it; no row of it was computed."""

    exit_code = 2


class JobCancelled(RowmillError):
    """The job that was waited for was cancelled, or its completion window passed."""

    exit_code = 5


class Interrupted(RowmillError):
    """Stopped by the user. Everything finished is flushed; the same command resumes."""

    exit_code = 5


class WaitTimeout(RowmillError):
    """The job was still going when the wait ended."""

    exit_code = 124


class Unexpected(RowmillError):
    """Something that Rowmill did not foresee; ``__cause__`` is what was raised first."""
