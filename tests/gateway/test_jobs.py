"""``/api/v1/jobs``: a job from submit to its output, run by ``serve --embedded``; and what HTTP may not name."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from pipeline.client.client import Client
from pipeline.config.settings import Settings
from pipeline.gateway.app import create_app
from pipeline.gateway.context import Gateway
from storage import failpoints
from tests.gateway.conftest import NewKey


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    (tmp_path / "acme").mkdir()
    pq.write_table(pa.table({"text": [f"t{n}" for n in range(5)]}), tmp_path / "acme" / "in.parquet")
    return settings.model_copy(update={"job_uri_prefixes": (f"{tmp_path}/{{tenant}}",)})


def spec_of(folder: Path, name: str = "out", **more: Any) -> dict[str, Any]:
    home = folder / "acme"
    return {
        "input": f"{home}/in.parquet",
        "output": f"{home}/{name}",
        "model": "fake",
        "task": "embed",
        "column": "text",
    } | more


def submit(web: TestClient, headers: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    answer = web.post("/api/v1/jobs", json=spec, headers=headers)
    assert answer.status_code == 201, answer.text
    job: dict[str, Any] = answer.json()["job"]
    return job


def test_a_job_from_submit_to_its_rows(web: TestClient, gateway: Gateway, key: NewKey, tmp_path: Path) -> None:
    both = key("submit", "read")
    assert web.post("/api/v1/estimate", json=spec_of(tmp_path), headers=both).json()["estimate"]["rows"] == 5
    job = submit(web, both, spec_of(tmp_path))
    assert job["tenant"] == "acme"
    gateway.client.job(job["id"]).wait(60)
    at = f"/api/v1/jobs/{job['id']}"
    shown = web.get(at, headers=both).json()["job"]
    assert (shown["state"], shown["rows_done"]) == ("completed", 5)
    assert pq.read_table(tmp_path / "acme" / "out" / "data").num_rows == 5
    assert web.get(f"{at}/rows/4", headers=both).json()["request"]["state"] == "succeeded"
    assert web.get(f"{at}/rows/5", headers=both).status_code == 404
    assert web.get(f"{at}/errors", headers=both).json()["errors"] == []
    assert web.get(f"{at}/events", headers=both).json()["events"][0]["type"] == "job.validating"
    assert [item["state"] for item in web.get(f"{at}/attempts", headers=both).json()["attempts"]] == ["succeeded"]
    assert web.get(f"{at}/attempts", headers=both).json()["attempts"][0]["computed"] > 0, (
        "the names are those of --json"
    )
    assert web.post(f"{at}/cancel", headers=both).json()["job"]["state"] == "completed"
    assert web.delete(at, headers=both).json() == {"deleted": job["id"]}
    assert web.get(at, headers=both).status_code == 404


def test_failed_rows_and_their_retry(web: TestClient, gateway: Gateway, key: NewKey, tmp_path: Path) -> None:
    both = key("submit", "read")
    pq.write_table(pa.table({"text": ["a", None, "b", None]}), tmp_path / "acme" / "in.parquet")
    job = submit(web, both, spec_of(tmp_path))
    gateway.client.job(job["id"]).wait(60)
    at = f"/api/v1/jobs/{job['id']}"
    page = web.get(f"{at}/errors?limit=1", headers=both).json()
    assert (page["errors"][0]["row"], page["total"], page["after"]) == (1, 2, 1)
    page = web.get(f"{at}/errors?limit=1&after=1", headers=both).json()
    assert ([item["row"] for item in page["errors"]], page["after"]) == ([3], None)
    assert web.post(f"{at}/retry", json={"failed_only": True}, headers=both).status_code == 200
    assert gateway.client.job(job["id"]).wait(60).rows_failed == 2
    assert web.post(f"{at}/retry", json={"failed_only": "yes"}, headers=both).status_code == 400


def test_the_same_key_is_the_same_job(web: TestClient, key: NewKey, tmp_path: Path) -> None:
    both = key("submit", "read")
    again = both | {"idempotency-key": "k1"}
    first = submit(web, again, spec_of(tmp_path))
    assert submit(web, again, spec_of(tmp_path))["id"] == first["id"]
    other = web.post("/api/v1/jobs", json=spec_of(tmp_path, "else"), headers=again)
    assert (other.status_code, other.json()["error"]["param"]) == (409, "idempotency_key")
    assert other.headers["x-should-retry"] == "false"
    assert web.post("/api/v1/jobs", json=spec_of(tmp_path, idempotency_key="k2"), headers=again).status_code == 400


def test_jobs_page_by_page(web: TestClient, key: NewKey, tmp_path: Path) -> None:
    both = key("submit", "read")
    made = [submit(web, both, spec_of(tmp_path, f"out-{n}"))["id"] for n in range(3)]
    first = web.get("/api/v1/jobs?limit=2", headers=both).json()
    assert ([job["id"] for job in first["jobs"]], first["after"]) == (made[:0:-1], made[1])
    rest = web.get(f"/api/v1/jobs?limit=2&after={made[1]}", headers=both).json()
    assert ([job["id"] for job in rest["jobs"]], rest["after"]) == (made[:1], None)
    assert web.get("/api/v1/jobs?after=nothing", headers=both).status_code == 404
    assert web.get("/api/v1/jobs?state=nothing", headers=both).status_code == 400
    assert web.get("/api/v1/jobs?limit=0", headers=both).status_code == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "/etc/passwd"}, "input"),
        ({"input": "in.parquet"}, "input"),
        ({"input": "HOME/link/in.parquet"}, "input"),
        ({"input": "HOME/../other/in.parquet"}, "input"),
        ({"input": ["HOME/in.parquet", "file:///etc/*"]}, "input"),
        ({"input": "simplecache::file:///etc/passwd"}, None),
        ({"input": "s3://elsewhere/in.parquet"}, "input"),
        ({"output": "/var/lib/out"}, "output"),
        ({"output": "HOME-evil/out"}, "output"),
        ({"model": "/models/llama"}, "model"),
        ({"tenant": "other"}, "tenant"),
        ({"engine": "vllm", "engine_options": {"tokenizer": "/etc"}}, None),
        ({"engine_options": {"trust_remote_code": True}}, None),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"nothing": 1}, "nothing"),
        ({"priority": 10**30}, "priority"),
    ],
)
def test_what_a_job_over_http_may_not_name(
    web: TestClient, key: NewKey, tmp_path: Path, fields: dict[str, Any], param: str | None
) -> None:
    (tmp_path / "acme" / "link").symlink_to("/etc")
    home = str(tmp_path / "acme")
    fields = {
        name: [item.replace("HOME", home) for item in value]
        if isinstance(value, list)
        else value.replace("HOME", home)
        if isinstance(value, str)
        else value
        for name, value in fields.items()
    }
    answer = web.post("/api/v1/jobs", json=spec_of(tmp_path) | fields, headers=key("submit"))
    assert answer.status_code == 400, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param


def test_no_place_is_allowed_by_default(tmp_path: Path) -> None:
    assert Settings(data_dir=tmp_path).job_uri_prefixes == ()


def test_a_job_that_is_planned_elsewhere_meanwhile_is_submitted(
    web: TestClient, gateway: Gateway, key: NewKey, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whoever runs jobs may see a new one before its submit has stored the plan: the submit is none the worse."""
    request.addfinalizer(failpoints.disarm)
    name, seen = "out-raced", []

    def run_it_first() -> None:
        failpoints.disarm()
        (job,) = gateway.client.jobs(output=str(tmp_path / "acme" / name))
        seen.append(gateway.client.job(job.id).wait(60).state)

    failpoints.arm("submit.inserted", run_it_first)
    job = submit(web, key("submit"), spec_of(tmp_path, name))
    assert (seen, job["state"]) == (["completed"], "completed")


def test_a_job_that_an_earlier_process_left_is_run(settings: Settings, tmp_path: Path) -> None:
    with Client(settings=settings) as client:
        left = client.submit(start=False, **spec_of(tmp_path)).id
    with TestClient(create_app(settings, embedded=True)) as web:
        gateway = web.app.state.gateway  # type: ignore[attr-defined]
        ended = threading.Event()
        while not ended.wait(0.05):
            if gateway.client.job(left).status().terminal:
                ended.set()
        assert gateway.client.job(left).status().rows_done == 5
