"""What an exception means to the person at the command line: a message, a kind and an exit code. By type alone."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.spec.status import JobStatus
from storage import errors
from storage.redaction import redact_text
from storage.states import JobState

OK, ERROR, USAGE, JOB_FAILED, FAILED_ROWS, CANCELLED, NOT_FOUND, UNREACHABLE, QUOTA = range(9)
WAIT_TIMED_OUT = 124
SIGNALLED = 130
"""Ended at once by a signal (128 + SIGINT)."""

_SITUATIONS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EMFILE,
        errno.ENFILE,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EIO,
        errno.ENOTDIR,
        errno.EISDIR,
    }
)
"""``OSError``s that tell of the machine, not of a mistake in Rowmill."""


@dataclass(frozen=True, slots=True)
class Failure:
    """``kind`` is the exception's class; ``expected`` is false for a defect, whose traceback is worth keeping."""

    kind: str
    message: str
    exit_code: int
    field: str | None = None
    expected: bool = True

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "message": self.message, "field": self.field, "exit_code": self.exit_code}


def describe(error: BaseException) -> Failure:
    """The failure that ``error`` means. Never raises."""
    if isinstance(error, errors.Unexpected) and error.__cause__ is not None:
        error = error.__cause__
    kind = type(error).__name__
    if isinstance(error, errors.RowmillError):
        text = str(error) or (type(error).__doc__ or kind).splitlines()[0]
        return Failure(kind, text, error.exit_code, getattr(error, "field", None))
    if isinstance(error, KeyboardInterrupt):
        return Failure("Interrupted", "interrupted", SIGNALLED)
    if isinstance(error, MemoryError):
        return Failure(kind, "not enough memory; try smaller --shard-rows, or less memory for the engine", ERROR)
    if isinstance(error, OSError) and error.errno in _SITUATIONS:
        where = f": {error.filename}" if error.filename else ""
        return Failure(kind, f"{os.strerror(error.errno).lower()}{where}", ERROR)
    return Failure(kind, f"unexpected {kind}: {error}", ERROR, expected=False)


def exit_code(status: JobStatus) -> int:
    """What a command that waited for a job ends with, by what it found."""
    match status.state:
        case JobState.COMPLETED:
            return FAILED_ROWS if status.rows_failed else OK
        case JobState.FAILED:
            return USAGE if status.refused else JOB_FAILED
        case JobState.CANCELLED | JobState.EXPIRED:
            return CANCELLED
    return OK


def write_crash_log(error: BaseException, data_dir: Path | None) -> Path:
    """Write the traceback below ``data_dir/logs``, or where temporary files go if that cannot be written."""
    text = "".join(traceback.format_exception(error))
    text = redact_text(f"python {sys.version}\nargv {sys.argv!r}\n\n{text}")
    name = f"crash-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    if data_dir is not None:
        path = data_dir / "logs" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError:
            pass  # the same full or read-only disk may be what went wrong
        else:
            return path
    path = Path(tempfile.mkdtemp(prefix="rowmill-")) / name
    path.write_text(text)
    return path
