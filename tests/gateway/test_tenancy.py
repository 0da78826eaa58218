"""Every route needs a key with its scope, and another tenant's objects are not found, whatever the route."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from pipeline.config.settings import Settings
from pipeline.gateway.app import create_app
from pipeline.gateway.context import Gateway
from tests.gateway.conftest import NewKey

OPEN = {"/healthz", "/readyz"}
OPERATOR = ("/api/v1/tenants", "/api/v1/keys", "/api/v1/workers", "/api/v1/queues")


def routes() -> Iterator[tuple[str, str]]:
    document = create_app(Settings(), embedded=True).openapi()
    for path, methods in document["paths"].items():
        for method in methods:
            if path not in OPEN:
                yield method.upper(), path


ROUTES = sorted(routes())


def call(web: TestClient, method: str, path: str, headers: dict[str, str], named: str = "nothing") -> Any:
    at = re.sub(r"\{row\}", "0", path)
    at = re.sub(r"\{\w+\}", named, at)
    return web.request(method, at, headers=headers)


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"job_uri_prefixes": (f"{tmp_path}",)})


def test_every_route_needs_a_key_with_its_scope(web: TestClient, key: NewKey) -> None:
    """Routes that a newcomer adds are found by themselves."""
    assert len(ROUTES) > 20
    scopes = {scope: key(scope) for scope in ("submit", "read", "admin")}
    for method, path in ROUTES:
        assert call(web, method, path, {}).status_code == 401, path
        needed = "admin" if path.startswith(OPERATOR) else "read" if method in ("GET", "HEAD") else "submit"
        for scope, headers in scopes.items():
            status = call(web, method, path, headers).status_code
            assert (status == 403) == (scope != needed), (method, path, scope, status)
            assert status < 500, (method, path)


def test_another_tenants_objects_are_not_found(web: TestClient, gateway: Gateway, key: NewKey, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
    job = {"input": f"{tmp_path}/in.parquet", "output": f"{tmp_path}/out", "model": "fake"}
    job |= {"task": "embed", "column": "text"}
    owner, other = key("submit", "read"), key("submit", "read", tenant="other")
    job_id = web.post("/api/v1/jobs", json=job, headers=owner).json()["job"]["id"]
    later = {"name": "nightly", "cron": "0 2 * * *", "job": job | {"output": f"{tmp_path}/{{fire_date:%Y-%m-%d}}"}}
    added = web.post("/api/v1/schedules", json=later, headers=owner)
    assert added.status_code == 201, added.text
    gateway.client.job(job_id).wait(60)
    names = {"/api/v1/jobs/": job_id, "/api/v1/schedules/": "nightly"}
    crossed = 0
    for method, path in ROUTES:
        for place, named in names.items():
            if path.startswith(place):
                answer = call(web, method, path, other, named)
                assert answer.status_code == 404, (method, path)
                assert answer.json()["error"]["code"] == "not_found"
                crossed += 1
    assert crossed >= 12
    for listing in ("jobs", "schedules"):
        assert web.get(f"/api/v1/{listing}", headers=other).json()[listing] == []
        assert len(web.get(f"/api/v1/{listing}", headers=owner).json()[listing]) == 1
    # Nothing was changed by the attempts.
    assert web.get(f"/api/v1/jobs/{job_id}", headers=owner).json()["job"]["state"] == "completed"


def test_operators_make_tenants_and_keys(web: TestClient, key: NewKey) -> None:
    admin = key("admin")
    made = web.post("/api/v1/tenants", json={"name": "new", "max_jobs": 3}, headers=admin)
    assert made.status_code == 201 and made.json()["tenant"]["max_jobs"] == 3
    assert web.post("/api/v1/tenants", json={"name": "new"}, headers=admin).status_code == 409
    assert web.patch("/api/v1/tenants/new", json={"max_jobs": None}, headers=admin).json()["tenant"]["max_jobs"] is None
    assert web.patch("/api/v1/tenants/new", json={"max_jobs": "x"}, headers=admin).status_code == 400
    created = web.post("/api/v1/keys", json={"tenant": "new", "scopes": ["read"]}, headers=admin).json()
    headers = {"authorization": f"Bearer {created['key']}"}
    assert web.get("/api/v1/jobs", headers=headers).status_code == 200
    listed = web.get("/api/v1/keys?tenant=new", headers=admin)
    assert [item["id"] for item in listed.json()["keys"]] == [created["id"]] and created["key"] not in listed.text
    assert web.post(f"/api/v1/keys/{created['id']}/revoke", headers=admin).status_code == 200
    assert web.get("/api/v1/jobs", headers=headers).status_code == 401
    other = web.post("/api/v1/keys", json={"tenant": "new", "scopes": ["read"]}, headers=admin).json()
    assert web.delete("/api/v1/tenants/new", headers=admin).status_code == 200
    assert web.get("/api/v1/jobs", headers={"authorization": f"Bearer {other['key']}"}).status_code == 401
    for path in ("/api/v1/workers", "/api/v1/queues", "/api/v1/tenants/acme"):
        assert web.get(path, headers=admin).status_code == 200


def test_the_document_has_examples(web: TestClient) -> None:
    app = web.app
    assert isinstance(app, FastAPI)
    document = app.openapi()
    post = document["paths"]["/api/v1/jobs"]["post"]
    assert post["requestBody"]["content"]["application/json"]["examples"]["generate"]["value"]["model"]
    assert post["security"] == [{"HTTPBearer": []}]
