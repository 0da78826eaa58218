"""``/v1/files``: uploads that go straight to the object store, and downloads that come straight from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from pipeline.batches import places
from pipeline.gateway.auth import Caller, Reader, Submitter
from pipeline.gateway.context import Gateway, Here
from pipeline.gateway.errors import ApiError
from pipeline.gateway.openai import objects
from pipeline.gateway.openai.upload_form import UploadForm
from storage.errors import RowmillError
from storage.files import files
from storage.files.records import File, Purpose

router = APIRouter(tags=["files"])

KEPT_SECONDS = 2_592_000
"""How long an uploaded batch file is kept, unless it says otherwise: 30 days. Also the longest that it may say."""
LEAST_KEPT_SECONDS = 3_600
_BLOCK = 2**20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.post("/files", openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["batch"]}},
}}}}})  # fmt: skip
async def create(request: Request, gateway: Here, caller: Submitter) -> dict[str, Any]:
    """Upload a file of requests, one in each line. It is checked when a batch reads it."""
    return objects.file(await _upload(request, gateway, caller))


@router.get("/files")
def listed(
    gateway: Here,
    caller: Reader,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """The tenant's files, page by page."""
    found, more = files.listed(
        gateway.database, caller.tenant, purpose=purpose, limit=limit, after=after, newest_first=order == "desc"
    )
    return objects.page([objects.file(item) for item in found], more=more)


@router.get("/files/{file_id}")
def retrieve(file_id: str, gateway: Here, caller: Reader) -> dict[str, Any]:
    return objects.file(files.get(gateway.database, caller.tenant, file_id))


@router.delete("/files/{file_id}")
def delete(file_id: str, gateway: Here, caller: Submitter) -> dict[str, Any]:
    """Nobody sees the file any more. A batch that reads it goes on."""
    files.delete(gateway.database, caller.tenant, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.api_route("/files/{file_id}/content", methods=["GET", "HEAD"], response_class=StreamingResponse)
def content(file_id: str, request: Request, gateway: Here, caller: Reader) -> Response:
    """What the file holds; a ``Range`` of bytes of it."""
    found = files.get(gateway.database, caller.tenant, file_id)
    begin, end = _range(request.headers.get("range"), found.n_bytes)
    headers = {
        "content-length": str(end - begin),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(found.filename, safe='')}",
        "accept-ranges": "bytes",
        "x-content-type-options": "nosniff",
    }
    partial = (begin, end) != (0, found.n_bytes)
    if partial:
        headers["content-range"] = f"bytes {begin}-{end - 1}/{found.n_bytes}"
    status, kind = 206 if partial else 200, "application/octet-stream"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=kind)
    return StreamingResponse(_blocks(gateway, found, begin, end), status, headers, kind)


def _blocks(gateway: Gateway, found: File, begin: int, end: int) -> Iterator[bytes]:
    with gateway.store.open(found.uri) as stream:
        stream.seek(begin)
        while begin < end and (block := stream.read(min(_BLOCK, end - begin))):
            begin += len(block)
            yield block


def _range(asked: str | None, size: int) -> tuple[int, int]:
    """The bytes that a ``Range`` header means, end excluded. One that is not understood means all of them."""
    match = None if asked is None else _RANGE.fullmatch(asked.strip())
    if match is None or match[0] == "bytes=-":
        return 0, size
    first, last = match[1], match[2]
    begin = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if begin >= size or begin >= end:
        raise ApiError(
            416, f"the file has {size:,} bytes", code="invalid_range", headers={"content-range": f"bytes */{size}"}
        )
    return begin, end


async def _upload(request: Request, gateway: Gateway, caller: Caller) -> File:
    database, settings = gateway.database, gateway.settings
    file_id = places.new_id("file")
    uri = places.file_uri(settings, file_id)
    writing = None
    await run_in_threadpool(
        files.begin, database, file_id=file_id, tenant=caller.tenant, purpose=Purpose.BATCH, uri=uri
    )
    try:
        writing = await run_in_threadpool(gateway.store.stream, uri)
        form = UploadForm(request.headers.get("content-type", ""), writing.write, settings.max_file_bytes)
        async for piece in request.stream():
            await run_in_threadpool(form.feed, piece)
        form.end()
        _check_purpose(form.fields.get("purpose"))
        seconds = _kept(form.fields)
        await run_in_threadpool(writing.__exit__, None, None, None)
        return await run_in_threadpool(
            files.finish,
            database,
            file_id,
            tenant=caller.tenant,
            filename=form.filename or "",
            n_bytes=form.n_bytes,
            seconds=seconds,
        )
    except BaseException as error:
        # Not awaited: the caller may be gone, and then nothing that is awaited here would be finished.
        with suppress(RowmillError):  # a file that is left over is collected later
            if writing is not None:
                writing.close()
            files.abandon(database, file_id)
        if isinstance(error, ClientDisconnect):
            raise ApiError(400, "the caller hung up before the file had ended", code="incomplete_upload") from None
        raise


def _check_purpose(purpose: str | None) -> None:
    if purpose != Purpose.BATCH:
        code = "missing_required_parameter" if purpose is None else "invalid_value"
        raise ApiError(400, "purpose must be 'batch'", code=code, param="purpose")


def _kept(fields: dict[str, str]) -> float:
    """Seconds from ``expires_after[anchor]`` and ``expires_after[seconds]``, as OpenAI's clients send them."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return KEPT_SECONDS
    return kept_seconds(anchor, int(seconds) if seconds is not None and seconds.isdecimal() else None, "expires_after")


def kept_seconds(anchor: Any, seconds: Any, param: str) -> float:
    """The seconds of an expiry policy. Raises :class:`ApiError` for another anchor or a time out of bounds."""
    if anchor != "created_at":
        raise ApiError(400, f"{param}.anchor must be 'created_at'", code="invalid_value", param=f"{param}.anchor")
    is_whole = isinstance(seconds, int) and not isinstance(seconds, bool)
    if not is_whole or not LEAST_KEPT_SECONDS <= seconds <= KEPT_SECONDS:
        message = f"{param}.seconds must be a whole number from {LEAST_KEPT_SECONDS:,} to {KEPT_SECONDS:,}"
        raise ApiError(400, message, code="invalid_value", param=f"{param}.seconds")
    return float(seconds)
