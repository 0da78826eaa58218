"""What operators look at and change over HTTP: models, tenants, keys, workers, queues. Keys with the scope admin."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict

from pipeline.client import documents
from pipeline.client.keys import Keys
from pipeline.gateway.auth import Admin, Caller, Reader
from pipeline.gateway.context import Gateway, Here
from storage.fleet import reports, workers
from storage.registry.records import Revision

router = APIRouter()
Name = Annotated[str, Path(max_length=200)]


class TenantValues(BaseModel):
    """A tenant's share and its limits; ``null`` is no limit, and what is left out stays."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"example": {"max_jobs": 10}})
    weight: float = 1.0
    max_running: int | None = None
    max_jobs: int | None = None
    rows_per_day: int | None = None
    tokens_per_day: int | None = None


class NewTenant(TenantValues):
    """A tenant to register."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "acme", "max_jobs": 10}})
    name: str


class NewKey(BaseModel):
    """A key of a registered tenant. ``expires_in``: seconds from now; ``null`` is never."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"tenant": "acme", "scopes": ["submit", "read"]}}
    )
    tenant: str
    scopes: list[str]
    expires_in: float | None = None


@router.get("/models", tags=["models"])
def models(gateway: Here, caller: Reader) -> dict[str, Any]:
    """Revisions of the models that the tenant may name: its own and the operator's."""
    return {"models": [_revision(item) for item in gateway.client.models.list(caller.tenant)]}


@router.get("/tenants", tags=["tenants"])
def tenants(gateway: Here, caller: Admin) -> dict[str, Any]:
    """All tenants by name."""
    return {"tenants": [asdict(item) for item in gateway.client.tenants()]}


@router.post("/tenants", status_code=201, tags=["tenants"])
def add_tenant(gateway: Here, caller: Admin, new: NewTenant) -> dict[str, Any]:
    """Register a tenant."""
    return {"tenant": asdict(gateway.client.add_tenant(**new.model_dump(exclude_unset=True)))}


@router.get("/tenants/{name}", tags=["tenants"])
def tenant(gateway: Here, caller: Admin, name: Name) -> dict[str, Any]:
    """One tenant, and what it uses now."""
    found, usage = gateway.client.tenant(name)
    return {"tenant": {**asdict(found), **asdict(usage)}}


@router.patch("/tenants/{name}", tags=["tenants"])
def set_tenant(gateway: Here, caller: Admin, name: Name, values: TenantValues) -> dict[str, Any]:
    """Change some of a tenant's values; `null` lifts a limit."""
    return {"tenant": asdict(gateway.client.set_tenant(name, **values.model_dump(exclude_unset=True)))}


@router.delete("/tenants/{name}", tags=["tenants"])
def remove_tenant(gateway: Here, caller: Admin, name: Name) -> dict[str, Any]:
    """Forget a tenant without live jobs."""
    gateway.client.remove_tenant(name)
    return {"removed": name}


@router.get("/keys", tags=["keys"])
def keys(
    gateway: Here,
    caller: Admin,
    tenant: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: Annotated[str | None, Query(max_length=200)] = None,
) -> dict[str, Any]:
    """Keys, the newest first, never the keys themselves."""
    found = _keys(gateway, caller).list(tenant, limit=limit + 1, after=after)
    more, found = len(found) > limit, found[:limit]
    return {"keys": [item.to_json() for item in found], "after": found[-1].id if more else None}


@router.post("/keys", status_code=201, tags=["keys"])
def create_key(gateway: Here, caller: Admin, new: NewKey) -> dict[str, Any]:
    """Make a key. `key` is shown this once."""
    text, key = _keys(gateway, caller).create(new.tenant, new.scopes, expires_in=new.expires_in)
    return {"key": text, **key.to_json()}


@router.post("/keys/{key_id}/revoke", tags=["keys"])
def revoke_key(gateway: Here, caller: Admin, key_id: Name) -> dict[str, Any]:
    """End a key now; jobs that were submitted with it go on."""
    return {"revoked": _keys(gateway, caller).revoke(key_id).to_json()}


@router.post("/keys/{key_id}/rotate", tags=["keys"])
def rotate_key(
    gateway: Here, caller: Admin, key_id: Name, grace_seconds: Annotated[float, Query(ge=0, le=366 * 86_400)] = 0.0
) -> dict[str, Any]:
    """Make a key like it; the old one ends after `grace_seconds`."""
    text, key = _keys(gateway, caller).rotate(key_id, grace_seconds=grace_seconds)
    return {"key": text, **key.to_json()}


@router.get("/workers", tags=["operate"])
def listed_workers(gateway: Here, caller: Admin) -> dict[str, Any]:
    """Every worker: what it takes, what it has loaded, the shards it holds."""
    return {"workers": [documents.worker(item) for item in workers.listed(gateway.database)]}


@router.get("/queues", tags=["operate"])
def queues(gateway: Here, caller: Admin) -> dict[str, Any]:
    """Shards by queue and state, of all tenants."""
    return {"queues": reports.shards_by_queue(gateway.database)}


def _keys(gateway: Gateway, caller: Caller) -> Keys:
    """The audit trail names the caller's key."""
    return Keys(gateway.runtime, caller.actor)


def _revision(item: Revision) -> dict[str, Any]:
    return {
        "name": item.model.name,
        "tenant": item.model.tenant,
        "revision": item.number,
        "state": str(item.state),
        "digest": item.digest,
        "task": item.task,
        "created_at": item.created_at,
    }
