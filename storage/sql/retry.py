"""Fenced writes while the database does not answer: they are repeated, which is safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from storage.errors import CommitUnknown, TransientError

T = TypeVar("T")


PATIENCE_SECONDS = 600.0
"""How long an attempt waits for a database that does not answer, before it gives up what it has not flushed."""


def retry_write(call: Callable[[], T], *, seconds: float = PATIENCE_SECONDS) -> T:
    """Repeat ``call`` while the database does not answer: for fenced writes, which are safe to repeat.

    One that took effect although its COMMIT went unanswered finds itself fenced: :class:`LeaseLost`.
    """
    retrying = Retrying(
        retry=retry_if_exception_type((TransientError, CommitUnknown)),
        wait=wait_exponential_jitter(multiplier=0.2, max=10.0),
        stop=stop_after_delay(seconds),
        reraise=True,
    )
    return retrying(call)
