"""What surrounds every request, as plain ASGI: other middleware would hide from a route that its caller has gone."""

from __future__ import annotations

import secrets

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.gateway.errors import OUR_FAULT, ApiError, answer
from storage.log_actions import Action
from storage.logs import bound, get_logger

log = get_logger(__name__)

MOST_BODY_BYTES = 4 * 2**20
"""Most bytes of a body that is no upload: a job, a batch. Uploads (multipart) have limits of their own."""


class Requests:
    """Gives each request an id (``x-request-id``), takes trailing slashes off, bounds bodies, answers defects."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id
        if len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope["path"] = scope["path"].rstrip("/") or "/"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            with bound(request_id=request_id):
                await self._app(scope, _bounded(scope, receive), send_with_id)
        except Exception:
            log.exception(
                "request %s failed: %s %s",
                request_id,
                scope["method"],
                scope["path"],
                action=Action.REQUEST_FAILED,
                request_id=request_id,  # the ids of the request are no longer bound
            )
            if started:
                raise  # the connection breaks, so that nobody takes what was sent for the whole
            defect = ApiError(500, OUR_FAULT[500], code="internal_error")
            await answer(defect)(scope, receive, send_with_id)


def _bounded(scope: Scope, receive: Receive) -> Receive:
    """``receive`` that refuses a long body, unless it is an upload."""
    if Headers(scope=scope).get("content-type", "").startswith("multipart/form-data"):
        return receive
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            if taken > MOST_BODY_BYTES:
                # FastAPI passes on this class alone.
                raise HTTPException(413, f"the body is longer than {MOST_BODY_BYTES:,} bytes")
        return message

    return bounded
