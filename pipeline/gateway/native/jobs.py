"""``/api/v1/jobs``: submit, list, follow, cancel, retry; each route sees the jobs of its caller's tenant alone."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from pipeline.client import documents
from pipeline.client.handle import JobHandle
from pipeline.gateway.auth import Caller, Reader, Submitter
from pipeline.gateway.context import Gateway, Here
from pipeline.gateway.native.admission import admitted
from pipeline.spec.values import MOST
from storage.errors import InvalidJob
from storage.fleet import job_lookup

router = APIRouter(tags=["jobs"])

JobId = Annotated[str, Path(max_length=200, description="The job's id, or an unambiguous beginning or end of it")]
Row = Annotated[int, Path(ge=0, le=MOST, description="Row of the job's input, from 0")]
Spec = Annotated[
    dict[str, Any],
    Body(
        description="The fields of JobSpec (docs/reference/job-spec.schema.json)",
        openapi_examples={
            "generate": {
                "value": {
                    "input": "s3://corpus/2026/*.parquet",
                    "output": "s3://results/run-1",
                    "model": "llama-3-8b",
                    "task": "generate",
                    "prompt": "Summarise in one line:\n{text}",
                    "sampling": {"max_tokens": 64, "temperature": 0},
                }
            }
        },
    ),
]


class Retry(BaseModel):
    """What to compute again: the failed rows, or all of them."""

    model_config = ConfigDict(extra="forbid")
    failed_only: bool = Field(default=True, strict=True)


@router.post("/jobs", status_code=201)
def create(
    gateway: Here,
    caller: Submitter,
    spec: Spec,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> dict[str, Any]:
    """Submit a job. The same `Idempotency-Key` (or `idempotency_key`) again is the same job; with other work, 409."""
    if idempotency_key is not None:
        if spec.get("idempotency_key") not in (None, idempotency_key):
            raise InvalidJob("the header and the body give different keys", field="idempotency_key")
        spec = {**spec, "idempotency_key": idempotency_key}
    handle = gateway.client.submit(start=False, **admitted(gateway, caller, spec))
    gateway.wake()
    return {"job": handle.status().to_json()}


@router.post("/estimate")
def estimate(gateway: Here, caller: Submitter, spec: Spec) -> dict[str, Any]:
    """What a job would be: rows, bytes, shards. Nothing is queued."""
    return {"estimate": gateway.client.estimate(**admitted(gateway, caller, spec)).to_json()}


@router.get("/jobs")
def listed(
    gateway: Here,
    caller: Reader,
    state: Annotated[str | None, Query(max_length=50)] = None,
    output: Annotated[str | None, Query(max_length=8192, description="Only jobs that write there or below")] = None,
    since: Annotated[float | None, Query(allow_inf_nan=False, description="Unix seconds")] = None,
    before: Annotated[float | None, Query(allow_inf_nan=False, description="Unix seconds")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: Annotated[str | None, Query(max_length=200, description="The last job of the page before")] = None,
) -> dict[str, Any]:
    """Jobs, the newest first. `after` in the answer is what to ask on with; null at the end."""
    if after is not None:
        after = _owned(gateway, caller, after).id
    found = gateway.client.jobs(
        state, limit + 1, after, tenant=caller.tenant, output=output, since=since, before=before
    )
    more = len(found) > limit
    found = found[:limit]
    return {"jobs": [status.to_json() for status in found], "after": found[-1].id if more else None}


@router.get("/jobs/{job_id}")
def show(gateway: Here, caller: Reader, job_id: JobId) -> dict[str, Any]:
    """One job at this moment."""
    return {"job": _owned(gateway, caller, job_id).status().to_json()}


@router.delete("/jobs/{job_id}")
def delete(gateway: Here, caller: Submitter, job_id: JobId) -> dict[str, Any]:
    """Forget a job that has ended. What it published stays."""
    handle = _owned(gateway, caller, job_id)
    handle.delete()
    return {"deleted": handle.id}


@router.post("/jobs/{job_id}/cancel")
def cancel(gateway: Here, caller: Submitter, job_id: JobId) -> dict[str, Any]:
    """Stop the job; its finished rows are published. Harmless for one that has ended: the answer says how."""
    return {"job": _owned(gateway, caller, job_id).cancel().to_json()}


@router.post("/jobs/{job_id}/retry")
def retry(
    gateway: Here, caller: Submitter, job_id: JobId, what: Annotated[Retry | None, Body()] = None
) -> dict[str, Any]:
    """Queue an ended job again: its unfinished shards, and its failed rows (or all rows)."""
    status = _owned(gateway, caller, job_id).retry(failed_only=(what or Retry()).failed_only)
    gateway.wake()
    return {"job": status.to_json()}


@router.get("/jobs/{job_id}/rows/{row}")
def request(gateway: Here, caller: Reader, job_id: JobId, row: Row) -> dict[str, Any]:
    """Where one row stands."""
    return {"request": _owned(gateway, caller, job_id).request(row).to_json()}


@router.get("/jobs/{job_id}/errors")
def failed_rows(
    gateway: Here,
    caller: Reader,
    job_id: JobId,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[int | None, Query(ge=0, le=MOST, description="The last row of the page before")] = None,
) -> dict[str, Any]:
    """The failed rows in input order, with code and message."""
    return documents.failed_rows(_owned(gateway, caller, job_id), limit, after)


@router.get("/jobs/{job_id}/events")
def events(gateway: Here, caller: Reader, job_id: JobId) -> dict[str, Any]:
    """The audit trail, the oldest first."""
    return {"events": [documents.event(item) for item in _owned(gateway, caller, job_id).events()]}


@router.get("/jobs/{job_id}/attempts")
def attempts(gateway: Here, caller: Reader, job_id: JobId) -> dict[str, Any]:
    """Every attempt at every shard."""
    return {"attempts": [documents.attempt(item) for item in _owned(gateway, caller, job_id).attempts()]}


def _owned(gateway: Gateway, caller: Caller, job_id: str) -> JobHandle:
    """A job of the caller's tenant. Raises :class:`~storage.errors.NotFound` also for another tenant's."""
    return JobHandle(gateway.session, job_lookup.find(gateway.database, job_id, tenant=caller.tenant).id)
