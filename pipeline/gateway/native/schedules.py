"""``/api/v1/schedules``: jobs of the caller's tenant that are submitted again and again."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict

from pipeline.client import documents
from pipeline.gateway.auth import Reader, Submitter
from pipeline.gateway.context import Here
from pipeline.gateway.native.admission import admitted

router = APIRouter(prefix="/schedules", tags=["schedules"])
Name = Annotated[str, Path(max_length=200)]


class NewSchedule(BaseModel):
    """A schedule: the fields of ``ScheduleSpec``; ``job`` has those of ``JobSpec``."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "name": "nightly",
                "cron": "0 2 * * *",
                "job": {
                    "input": "s3://corpus/{fire_date:%Y-%m-%d}/*.parquet",
                    "output": "s3://results/{fire_date:%Y-%m-%d}",
                    "model": "minilm",
                    "task": "embed",
                    "column": "text",
                },
            }
        },
    )
    name: str
    cron: str
    job: dict[str, Any]


@router.post("", status_code=201)
def add(gateway: Here, caller: Submitter, new: NewSchedule) -> dict[str, Any]:
    """Store a schedule; it comes due from now on."""
    job = admitted(gateway, caller, new.job)
    options = dict(new.model_extra or {})
    return {"schedule": documents.schedule(gateway.client.schedules.add(new.name, cron=new.cron, job=job, **options))}


@router.get("")
def listed(gateway: Here, caller: Reader) -> dict[str, Any]:
    """Schedules by name."""
    return {"schedules": [documents.schedule(item) for item in gateway.client.schedules.list(caller.tenant)]}


@router.get("/{name}")
def show(gateway: Here, caller: Reader, name: Name, fires: Annotated[int, Query(ge=1, le=1000)] = 20) -> dict[str, Any]:
    """One schedule, and what came of its last fires, the newest first."""
    found = gateway.client.schedules.get(name, caller.tenant)
    last = gateway.client.schedules.fires(name, caller.tenant, fires)
    return {"schedule": documents.schedule(found), "fires": [documents.fire(item) for item in last]}


@router.post("/{name}/pause")
def pause(gateway: Here, caller: Submitter, name: Name) -> dict[str, Any]:
    """Let nothing come due until it is resumed."""
    return {"schedule": documents.schedule(gateway.client.schedules.pause(name, caller.tenant))}


@router.post("/{name}/resume")
def resume(gateway: Here, caller: Submitter, name: Name) -> dict[str, Any]:
    """Go on from now."""
    return {"schedule": documents.schedule(gateway.client.schedules.resume(name, caller.tenant))}


@router.delete("/{name}")
def remove(gateway: Here, caller: Submitter, name: Name) -> dict[str, Any]:
    """Delete it with its fires; its jobs stay."""
    gateway.client.schedules.remove(name, caller.tenant)
    return {"removed": name}
