"""``/v1/batches``. A create checks the shape of the request only; what is in the file is checked afterwards."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query

from pipeline.batches import places
from pipeline.gateway.auth import Reader, Submitter
from pipeline.gateway.context import Here
from pipeline.gateway.errors import ApiError
from pipeline.gateway.openai import objects
from pipeline.gateway.openai.file_routes import kept_seconds
from pipeline.spec.job_spec import duration_seconds
from pipeline.spec.request_fields import TASK_OF
from pipeline.spec.values import plain_text
from storage.files import batches
from storage.files.records import NewBatch

router = APIRouter(tags=["batches"])

_FIELDS = frozenset(
    {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after", "idempotency_key"}
)
_MOST_PAIRS, _MOST_KEY, _MOST_VALUE = 16, 64, 512
_LONGEST_ID = 256


@router.post("/batches")
def create(
    gateway: Here,
    caller: Submitter,
    body: Annotated[dict[str, Any], Body()],
    idempotency_key: Annotated[str | None, Header()] = None,
    x_stainless_retry_count: Annotated[str | None, Header()] = None,
) -> dict[str, Any]:
    """Create a batch from an uploaded file."""
    for name in body:
        if name not in _FIELDS:
            raise _invalid(name[:64], "there is no such parameter; remove it", code="unknown_parameter")
    required = ("input_file_id", "endpoint", "completion_window")
    file_id, endpoint, window = (_text(name, _present(body, name)) for name in required)
    if endpoint not in TASK_OF:
        raise _invalid("endpoint", f"must be one of {', '.join(TASK_OF)}")
    windows = gateway.settings.completion_windows
    if window not in windows:
        raise _invalid("completion_window", f"must be one of {', '.join(windows)}")
    metadata = _metadata(body.get("metadata"))
    output_seconds = _output_seconds(body.get("output_expires_after"))
    in_body = body.get("idempotency_key")
    key = in_body if in_body is not None else idempotency_key
    new = NewBatch(
        id=places.new_id("batch"),
        tenant=caller.tenant,
        endpoint=endpoint,
        input_file_id=file_id,
        completion_window=window,
        metadata=metadata,
        output_seconds=output_seconds,
        idem_key=None if key is None else _text("idempotency_key", key),
        body_hash=_canonical(body),
        key_id=caller.key_id,
    )
    repeated = _is_repeated(x_stainless_retry_count)
    found = batches.create(gateway.database, new, window_seconds=duration_seconds(window), repeated=repeated)
    gateway.batches.wake()
    return objects.batch(gateway.database, found)


@router.get("/batches")
def listed(
    gateway: Here, caller: Reader, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> dict[str, Any]:
    """The tenant's batches, newest first."""
    found, more = batches.listed(gateway.database, caller.tenant, limit=limit, after=after)
    return objects.page([objects.batch(gateway.database, item) for item in found], more=more)


@router.get("/batches/{batch_id}")
def retrieve(batch_id: str, gateway: Here, caller: Reader) -> dict[str, Any]:
    return objects.batch(gateway.database, batches.get(gateway.database, caller.tenant, batch_id))


@router.post("/batches/{batch_id}/cancel")
def cancel(batch_id: str, gateway: Here, caller: Submitter) -> dict[str, Any]:
    """Cancel a batch. What is finished is kept."""
    found = batches.request_cancel(gateway.database, caller.tenant, batch_id)
    gateway.batches.wake()
    return objects.batch(gateway.database, found)


def _invalid(param: str, why: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param}: {why}", code=code, param=param)


def _present(body: dict[str, Any], name: str) -> Any:
    if body.get(name) is None:
        raise _invalid(name, "it is required", code="missing_required_parameter")
    return body[name]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_ID:
        raise _invalid(name, f"must be text of 1 to {_LONGEST_ID} characters")
    return _plain(name, value)


def _plain(param: str, value: str) -> str:
    try:
        plain_text(value)
    except ValueError as error:
        raise _invalid(param, str(error)) from None
    return value


def _metadata(given: Any) -> dict[str, str] | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise _invalid("metadata", "must be an object of texts")
    if len(given) > _MOST_PAIRS:
        raise _invalid("metadata", f"has {len(given):,} pairs; {_MOST_PAIRS} are allowed")
    for key, value in given.items():
        param = f"metadata.{key[:_MOST_KEY]}"
        if not 0 < len(key) <= _MOST_KEY:
            raise _invalid(param, f"a key has 1 to {_MOST_KEY} characters")
        if not isinstance(value, str) or len(value) > _MOST_VALUE:
            raise _invalid(param, f"a value is text of at most {_MOST_VALUE} characters")
        _plain(param, key)
        _plain(param, value)
    return given


def _output_seconds(given: Any) -> float | None:
    if given is None:
        return None
    if not isinstance(given, dict) or not given.keys() <= {"anchor", "seconds"}:
        raise _invalid("output_expires_after", "must be an object with anchor and seconds")
    return kept_seconds(given.get("anchor"), given.get("seconds"), "output_expires_after")


def _canonical(body: dict[str, Any]) -> str:
    """The same for bodies that ask for the same: the order of keys, and parameters that are null, do not matter."""
    asked = {name: value for name, value in body.items() if value is not None and name != "idempotency_key"}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _is_repeated(count: str | None) -> bool:
    """Whether the ``openai`` client says that it sends the request again."""
    return count is not None and count.isdecimal() and int(count[:9]) > 0
