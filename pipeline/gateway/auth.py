"""Who calls: a bearer key says the tenant and what the key may be used for. No header or body says otherwise."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from pipeline.gateway.context import Here
from pipeline.gateway.errors import ApiError
from storage.tenants import keys
from storage.tenants.keys import Scope

_bearer = HTTPBearer(auto_error=False, description="An API key: `rowmill key create --tenant T --scope submit`")
_CHALLENGE = {"www-authenticate": "Bearer"}
EVERYBODY = "default"
"""The tenant of every caller where ``api_auth`` is ``off``."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request this is. ``key_id`` is ``None`` where keys are off."""

    tenant: str
    key_id: str | None
    scopes: frozenset[Scope]

    @property
    def actor(self) -> str:
        """Who the audit trail names."""
        return f"key:{self.key_id}" if self.key_id else "gateway"


def _caller(
    request: Request, gateway: Here, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    if gateway.settings.api_auth == "off":
        if not _is_loopback(request.url.hostname or ""):
            # A web page may have its own name resolve to this machine; its requests then carry that name.
            raise ApiError(403, "without keys only a loopback address may be called", code="wrong_host")
        return Caller(EVERYBODY, None, frozenset(Scope))
    if given is None:
        raise ApiError(
            401, "an API key is missing: send 'Authorization: Bearer rm_…'", code="missing_api_key", headers=_CHALLENGE
        )
    found = keys.find(gateway.database, given.credentials)
    if found is None:
        raise ApiError(401, "this API key is not known here", code="invalid_api_key", headers=_CHALLENGE)
    key, valid = found
    if not valid:
        what = "was revoked" if key.revoked_at is not None else "has expired"
        raise ApiError(401, f"this API key {what}", code="invalid_api_key", headers=_CHALLENGE)
    return Caller(key.tenant, key.id, key.scopes)


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _with(scope: Scope) -> Callable[[Caller], Caller]:
    def scoped(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
        if scope not in caller.scopes:
            has = ", ".join(sorted(caller.scopes))
            raise ApiError(403, f"this needs a key with the scope {scope}; this one has {has}", code="missing_scope")
        return caller

    return scoped


submitter = _with(Scope.SUBMIT)
"""Dependency of every write of the caller's own tenant."""
reader = _with(Scope.READ)
"""Dependency of every read (GET, HEAD)."""
admin = _with(Scope.ADMIN)
"""Dependency of what concerns keys, tenants, models and workers."""

Submitter = Annotated[Caller, Depends(submitter)]
Reader = Annotated[Caller, Depends(reader)]
Admin = Annotated[Caller, Depends(admin)]
