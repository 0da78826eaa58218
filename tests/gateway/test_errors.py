"""Every error has the shape that OpenAI's clients parse, and a request id."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from starlette.testclient import TestClient

from pipeline.gateway import auth
from pipeline.gateway.errors import of_rowmill
from pipeline.gateway.middleware import MOST_BODY_BYTES
from storage import errors
from tests.gateway.conftest import NewKey


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert answer.headers["x-request-id"].startswith("req_")
    return error


@pytest.fixture
def probes(web: TestClient) -> TestClient:
    """Routes that fail in each way, added to the real application."""
    app = web.app
    assert isinstance(app, FastAPI)

    @app.get("/v1/probe/defect")
    def defect() -> None:
        raise ZeroDivisionError("secret detail")

    @app.post("/v1/probe/body")
    def body(item: dict[str, int]) -> dict[str, int]:
        return item

    for name in ("submitter", "reader", "admin"):
        app.get(f"/v1/probe/{name}", dependencies=[Depends(getattr(auth, name))])(lambda: {"ok": True})
    return web


def test_unknown_routes_and_methods(probes: TestClient) -> None:
    assert error_of(probes.get("/v1/nothing"))["code"] == "not_found"
    wrong = probes.delete("/v1/probe/defect")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET"


def test_a_defect_is_answered_without_its_details(probes: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    answer = probes.get("/v1/probe/defect")
    assert answer.status_code == 500
    (record,) = (record for record in caplog.records if vars(record).get("action") == "request.failed")
    assert vars(record)["request_id"] == answer.headers["x-request-id"]
    assert error_of(answer)["type"] == "server_error" and "secret" not in answer.text


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        (b'{"a": "x"}', "invalid_value", "a"),
        (b'{"a": ', "invalid_json", None),
        (b"", "missing_required_parameter", None),
        (b"[" * 100_000, "invalid_request", None),
    ],
)
def test_bad_bodies_are_400(probes: TestClient, content: bytes, code: str, param: str | None) -> None:
    answer = probes.post("/v1/probe/body", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, param)


def test_long_bodies_are_413(probes: TestClient) -> None:
    answer = probes.post("/v1/probe/body", content=b" " * (MOST_BODY_BYTES + 1))
    assert answer.status_code == 413 and error_of(answer)["code"] == "too_large"


def test_a_trailing_slash_changes_nothing(probes: TestClient) -> None:
    assert probes.post("/v1/probe/body/", json={"a": 1}).json() == {"a": 1}


def test_keys(probes: TestClient, key: NewKey) -> None:
    for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "Bearer rm_" + "x" * 43}):
        answer = probes.get("/v1/probe/reader", headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert error_of(answer)["type"] == "authentication_error"
    for scope, route in (("submit", "submitter"), ("read", "reader"), ("admin", "admin")):
        headers = key(scope)
        for other in ("submitter", "reader", "admin"):
            answer = probes.get(f"/v1/probe/{other}", headers=headers)
            assert answer.status_code == (200 if other == route else 403)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.InvalidJob("no", field="prompt"), 400, "invalid_job"),
        (errors.Conflict("no"), 409, "conflict"),
        (errors.NotFound("no"), 404, "not_found"),
        (errors.QuotaExceeded("t", "max_jobs", used=1, limit=1), 429, "quota_exceeded"),
        (errors.IllegalTransition("job", "failed", "running"), 409, "illegal_transition"),
        (errors.Unreachable("host db-7"), 503, "unreachable"),
        (errors.StorageFull("/secret"), 507, "storage_full"),
        (errors.CorruptFile("part"), 500, "corrupt_file"),
    ],
)
def test_an_error_of_ours_has_one_status(error: errors.RowmillError, status: int, code: str) -> None:
    told = of_rowmill(error)
    assert (told.status, told.code) == (status, code)
    if status >= 500:
        assert str(error) not in told.message
