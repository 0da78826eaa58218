"""What is wrong with one request, as its row's error, and as the error that OpenAI's API would answer with."""

from __future__ import annotations

import re
from typing import Any

from pipeline.spec.error_codes import RowErrorCode
from storage.errors import RowError

_PARAM = re.compile(r"^([a-z_][a-z0-9_]{0,63}): (?=.)", re.DOTALL)
_OF_A_REQUEST = frozenset(
    {
        RowErrorCode.INVALID_VALUE,
        RowErrorCode.UNSUPPORTED_PARAMETER,
        RowErrorCode.MISSING_VALUE,
        RowErrorCode.INVALID_UTF8,
    }
)
NOT_COMPUTED = "server_error"
"""The code of a request that got no answer because the service gave it up."""
_SERVER = {
    NOT_COMPUTED: 500,
    RowErrorCode.ENGINE_REFUSED: 500,
    RowErrorCode.NOT_FINITE: 500,
    RowErrorCode.INVALID_OUTPUT: 500,
    RowErrorCode.POISON_ROW: 500,
}
"""Codes of failures that are not the request's fault."""
UNANSWERED = frozenset({RowErrorCode.REQUEST_TIMEOUT, RowErrorCode.TIMED_OUT, "batch_cancelled", "batch_expired"})
"""Codes of requests that got no answer at all: their lines have ``response: null``."""


class RequestError(RowError):
    """One request that cannot be answered. ``param``: the parameter at fault. The message begins with it, so that it is
    found again in the row's error: see :func:`error_body`."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, f"{param}: {message}" if param else message)
        self.param = param


def invalid(param: str, why: str) -> RequestError:
    return RequestError(RowErrorCode.INVALID_VALUE, why, param)


def missing(param: str) -> RequestError:
    return RequestError(RowErrorCode.MISSING_VALUE, "it is required", param)


def unsupported(param: str, why: str) -> RequestError:
    return RequestError(RowErrorCode.UNSUPPORTED_PARAMETER, why, param)


def status_code(code: str) -> int:
    """The HTTP status of a row's error."""
    return next((status for name, status in _SERVER.items() if name == code), 400)


def error_body(code: str, message: str) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}`` of a row's error."""
    match = _PARAM.match(message) if code in _OF_A_REQUEST else None
    kind = "invalid_request_error" if status_code(code) < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": match[1] if match else None, "code": code}}
