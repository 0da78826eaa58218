"""What goes wrong, as HTTP: a status, and ``{"error": {message, type, param, code}}`` in OpenAI's words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from storage import errors
from storage.errors import RowmillError
from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)

_STATUS: tuple[tuple[type[RowmillError], int], ...] = (
    (errors.QuotaExceeded, 429),
    (errors.Conflict, 409),
    (errors.InvalidJob, 400),
    (errors.NotFound, 404),
    (errors.IllegalTransition, 409),
    (errors.ActivationRefused, 409),
    (errors.StorageFull, 507),
    (errors.TransientError, 503),
    (errors.CommitUnknown, 503),
    (errors.Interrupted, 503),
)
"""The first class that fits says the status; anything else is 500."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
}
_RETRY_SECONDS = "5"


class ApiError(Exception):
    """An answer that is an error. ``code`` is stable; ``param`` names the part of the request at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})


def body(status: int, message: str, *, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The JSON document of an error."""
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(error: ApiError) -> JSONResponse:
    """The response of an error. A 409 or a 429 is final: the ``openai`` client would repeat them."""
    headers = dict(error.headers)
    if error.status in (409, 429):
        headers.setdefault("x-should-retry", "false")
    if error.status == 503:
        headers.setdefault("retry-after", _RETRY_SECONDS)
    document = body(error.status, error.message, code=error.code, param=error.param)
    return JSONResponse(document, status_code=error.status, headers=headers)


def of_rowmill(error: RowmillError) -> ApiError:
    """The answer to an error of the tree. What goes wrong inside the service is logged, and not told in detail."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    code = _snake(type(error).__name__)
    if status >= 500:
        log.error("a request failed: %s: %s", type(error).__name__, error, action=Action.REQUEST_FAILED)
        return ApiError(status, OUR_FAULT.get(status, OUR_FAULT[500]), code=code)
    return ApiError(status, str(error), code=code, param=getattr(error, "field", None))


OUR_FAULT = {
    500: "something went wrong inside the service; its log has the details under this x-request-id",
    503: "the database, the broker or the object store does not answer; try again",
    507: "the storage of the service is full; nothing was kept of this request",
}


def of_validation(problems: Sequence[Any]) -> ApiError:
    """The answer to a request whose body or parameters do not fit."""
    problem = problems[0]
    place = ".".join(str(part) for part in problem["loc"][1:]) or None
    code = "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"
    if problem["type"] == "json_invalid":
        code, place = "invalid_json", None
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}" if place else message, code=code, param=place)


def install(app: FastAPI) -> None:
    """Let every error of ``app`` be answered in this shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RowmillError)
    async def rowmill_error(request: Request, error: RowmillError) -> JSONResponse:
        if isinstance(error, errors.Unexpected) and error.__cause__ is not None:
            log.error("a request failed", exc_info=error.__cause__, action=Action.REQUEST_FAILED)
        return answer(of_rowmill(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code, message = _CODES.get(error.status_code), str(error.detail)
        if error.status_code == 404 and request.scope.get("route") is None:
            message = f"there is no {request.method} {request.url.path}"
        if error.status_code == 405:
            message = f"{request.method} is not a method of {request.url.path}"
        return answer(ApiError(error.status_code, message, code=code, headers=error.headers))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(of_validation(error.errors()))


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
