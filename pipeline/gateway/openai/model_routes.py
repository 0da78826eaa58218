"""``/v1/models``: what a batch may name as ``model``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from pipeline.batches.validation import FAKE
from pipeline.gateway.auth import Reader
from pipeline.gateway.context import Gateway, Here
from pipeline.gateway.openai import objects
from storage.errors import NotFound
from storage.registry import revisions
from storage.states import RevisionState

router = APIRouter(tags=["models"])


@router.get("/models")
def listed(gateway: Here, caller: Reader) -> dict[str, Any]:
    """The registered models that the tenant may use, and ``fake``, by name."""
    return {"object": "list", "data": list(_models(gateway, caller.tenant).values())}


@router.get("/models/{name:path}")
def retrieve(name: str, gateway: Here, caller: Reader) -> dict[str, Any]:
    found = _models(gateway, caller.tenant).get(name)
    if found is None:
        raise NotFound(f"the model {name[:200]!r} does not exist, or you have no access to it")
    return found


def _models(gateway: Gateway, tenant: str) -> dict[str, dict[str, Any]]:
    """Models with an active revision. A tenant's own goes before an operator's of the same name."""
    found: dict[str, dict[str, Any]] = {FAKE: objects.model(FAKE, 0, "rowmill")}
    revised = revisions.listed(gateway.database, tenant=tenant)
    for revision in sorted(revised, key=lambda item: item.model.tenant is not None):
        if revision.state is RevisionState.ACTIVE:
            name = revision.model.name
            found[name] = objects.model(name, revision.created_at, revision.model.tenant or "rowmill")
    return dict(sorted(found.items()))
