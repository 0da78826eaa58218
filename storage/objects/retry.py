"""Which errors of an object store may pass, by type and code, and how often they are tried again."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from tenacity import (
    RetryError,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    stop_all,
    wait_random_exponential,
)

from storage.errors import Unreachable

T = TypeVar("T")

_ERRNOS = frozenset({
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.EAGAIN, errno.EINTR, errno.ESTALE,
})  # fmt: skip
_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_CODES = frozenset({
    "SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "TooManyRequests",
    "TooManyRequestsException", "RequestLimitExceeded", "BandwidthLimitExceeded", "InternalError", "InternalFailure",
    "ServiceUnavailable", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict",
})  # fmt: skip
# By qualified name, so that no client library is imported to ask.
_TYPES = frozenset({
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.parsers.ResponseParserError",  # throttling answers may be cut short (fsspec/s3fs#484)
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "http.client.IncompleteRead",
    "urllib3.exceptions.ProtocolError",
    "urllib3.exceptions.TimeoutError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "google.auth.exceptions.TransportError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
})  # fmt: skip


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, innermost last."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def type_names(error: BaseException) -> set[str]:
    """Qualified names of the error's classes: for telling errors of libraries that may not be installed."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}


def response_code(error: BaseException) -> str | None:
    """The service's own error code (``"NoSuchKey"``), if botocore recorded one."""
    for cause in chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping) and isinstance(response.get("Error"), Mapping):
            code: Any = response["Error"].get("Code")
            return None if code is None else str(code)
    return None


def http_status(error: BaseException) -> int | None:
    """The HTTP status that the error carries, if any."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for name in ("status_code", "status", "code"):
        found = getattr(error, name, None)
        if isinstance(found, int):
            return found
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: time-outs, broken connections, throttling, a server's own failure."""
    for cause in chain(error):
        if isinstance(cause, (TimeoutError, ConnectionError)):
            return True
        if isinstance(cause, OSError) and cause.errno in _ERRNOS:
            return True
        if type_names(cause) & _TYPES or http_status(cause) in _STATUSES:
            return True
    return response_code(error) in _CODES


def retrying(call: Callable[[], T], *, what: str, seconds: float) -> T:
    """The result of ``call``, repeated after transient errors for up to ``seconds`` seconds, and three times at least.

    Waits a random time below a bound that doubles from 0.2 s to 10 s. Raises :class:`Unreachable`, naming ``what``,
    when the time is up; any other error is raised at once, unchanged.
    """
    attempts = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(multiplier=0.2, max=10.0),
        stop=stop_all(stop_after_delay(seconds), stop_after_attempt(3)),
    )
    try:
        return attempts(call)
    except RetryError as gone:
        last = gone.last_attempt.exception()
        tries = gone.last_attempt.attempt_number
        raise Unreachable(
            f"{what}: the object store does not answer ({type(last).__name__}: {last}); tried {tries} times"
        ) from last
