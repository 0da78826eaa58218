"""A gateway in this process, its database and files in a folder of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from starlette.testclient import TestClient

from pipeline.config.settings import Settings
from pipeline.gateway.app import create_app
from pipeline.gateway.context import Gateway
from storage.tenants import keys, tenants

NewKey = Callable[..., dict[str, str]]


@pytest.fixture
def web(settings: Settings) -> Iterator[TestClient]:
    """A client of the gateway without a key; a defect is answered, not raised."""
    with TestClient(create_app(settings, embedded=True), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def gateway(web: TestClient) -> Gateway:
    found = web.app.state.gateway  # type: ignore[attr-defined]
    assert isinstance(found, Gateway)
    return found


@pytest.fixture
def key(gateway: Gateway) -> NewKey:
    """``key("submit", "read", tenant="a")`` → headers with a new key."""

    def new(*scopes: str, tenant: str = "acme", expires_in: float | None = None) -> dict[str, str]:
        if tenant not in {item.name for item in tenants.listed(gateway.database)}:
            tenants.add(gateway.database, tenant)
        text, _ = keys.create(gateway.database, tenant, scopes, expires_in=expires_in, actor="test")
        return {"authorization": f"Bearer {text}"}

    return new
