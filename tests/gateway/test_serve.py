"""``rowmill serve`` as a program: what it refuses, that it is ready, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from pipeline.config.settings import Settings
from pipeline.gateway.app import create_app
from pipeline.gateway.context import Gateway
from pipeline.gateway.server import check, listen
from storage.errors import InvalidSettings
from storage.registry.records import Owned


def test_it_says_where_it_listens_and_ends_with_0(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli.main", "serve", "--embedded", "--port", "0", "--json"]
    with subprocess.Popen([*command, "--data-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")["url"]
            assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
            answer = httpx.get(f"{url}/readyz")
            checks = {"database": "ok", "object_store": "ok", "engine": "ok"}
            assert (answer.status_code, answer.json()["checks"]) == (200, checks)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("values", "embedded", "host", "field"),
    [
        ({}, False, "127.0.0.1", "broker_url"),
        ({"broker_url": "redis://127.0.0.1:1/0"}, True, "127.0.0.1", "broker_url"),
        ({"broker_url": "redis://127.0.0.1:1/0", "api_auth": "off"}, False, "127.0.0.1", "api_auth"),
        ({"api_auth": "off"}, True, "0.0.0.0", "api_auth"),
    ],
)
def test_settings_under_which_nothing_would_work(values: dict[str, str], embedded: bool, host: str, field: str) -> None:
    with listen(host, 0) as listener, pytest.raises(InvalidSettings) as caught:
        check(Settings(**values), listener, embedded=embedded)
    assert caught.value.field == field


def test_a_taken_port_is_said() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(InvalidSettings, match="--port"):
        listen("127.0.0.1", first.getsockname()[1])


def test_not_ready_without_the_files_of_an_active_model(web: TestClient, gateway: Gateway, tmp_path: Path) -> None:
    gateway.client.models.add("answers", "fake")
    gateway.client.models.activate("answers", force=True)
    assert web.get("/readyz").status_code == 200
    revision = gateway.client.models.active("answers")
    assert revision is not None and revision.model == Owned(None, "answers")
    with gateway.database.write() as connection:
        connection.exec_driver_sql("UPDATE model_revision SET place = '/nowhere/model'")
    answer = web.get("/readyz")
    assert answer.status_code == 503 and answer.json()["checks"]["engine"] == "NotFound"
    assert "nowhere" not in answer.text


def test_not_ready_without_the_broker(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache", broker_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(settings)) as web:
        answer = web.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"] == {"database": "ok", "object_store": "ok", "broker": "Unreachable"}


def test_keys_off_is_for_this_machine_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache", api_auth="off")
    app = create_app(settings, embedded=True)
    with TestClient(app, base_url="http://127.0.0.1") as web:
        assert web.get("/api/v1/jobs").status_code == 200
        # A page whose name was made to resolve to this machine.
        assert web.get("/api/v1/jobs", headers={"host": "evil.example"}).status_code == 403
