"""The process's own three streams: there from the start, and safe to write to whatever became of them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator

from pipeline.spec.words import is_terminal_size
from storage.errors import RowmillError

STDIN, STDOUT, STDERR = range(3)


class OutputError(RowmillError):
    """Standard output cannot be written. What was asked for is done all the same."""

    def __init__(self, error: OSError) -> None:
        reason = os.strerror(error.errno or errno.EIO).lower()
        super().__init__(
            f"stdout cannot be written ({reason}); what was to be done is done, and its result is not shown"
        )


def prepare() -> None:
    """Open what was closed (``>&-``) on ``/dev/null``, show what the terminal's encoding lacks as escapes, and forget
    a size of the terminal that is none.

    Without this the next file that is opened, such as the database, would get the number of a standard stream, and
    whatever a library prints would be written into it.
    """
    for name in ("COLUMNS", "LINES"):
        # Without a number that can be one, the terminal is asked; libraries show nothing in 0 columns, or stumble.
        if not is_terminal_size(os.environ.get(name, "1")):
            del os.environ[name]
    for number in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(STDIN, closefd=False)  # noqa: SIM115 - a descriptor, open to the end
    if sys.stdout is None:
        sys.stdout = open(STDOUT, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(STDERR, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Write text to stdout and flush it.

    Raises ``BrokenPipeError`` when nobody reads on, and :class:`OutputError` when it cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(STDOUT)
        raise OutputError(error) from error


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around the result of work that is done: when nobody reads it (``| true``), the exit code still says how the work
    ended."""
    try:
        yield
    except BrokenPipeError:
        discard(STDOUT)


def discard(number: int) -> None:
    """Send what is still buffered for a stream, and all that follows, to ``/dev/null``."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def finish(code: int) -> int:
    """Flush both streams; returns the exit code, which is an error when stdout could not be written."""
    for stream, number in ((sys.stdout, STDOUT), (sys.stderr, STDERR)):
        try:
            stream.flush()
        except (OSError, ValueError):
            discard(number)
            if number == STDOUT:
                code = code or 1
    return code
