"""``/healthz``: this process lives; ``/readyz``: it can take requests. Neither needs a key."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from pipeline.engines import registry
from pipeline.gateway.context import Gateway, Here
from storage.errors import InvalidModel, NotFound, RowmillError
from storage.log_actions import Action
from storage.logs import get_logger
from storage.objects.store import ObjectStore
from storage.registry import revisions
from storage.states import RevisionState

log = get_logger(__name__)
router = APIRouter(tags=["health"])
_STORE_SECONDS = 2.0


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "It cannot take requests; `checks` says why"}})
def readyz(gateway: Here) -> JSONResponse:
    """The database, the object store and the broker answer; with `--embedded`, an engine can be loaded."""
    checks = {"database": _database, "object_store": _object_store}
    checks |= {"engine": _engine} if gateway.embedded else {"broker": _broker}
    found = {name: _said(check, gateway) for name, check in checks.items()}
    ready = all(value == "ok" for value in found.values())
    document = {"status": "ok" if ready else "unavailable", "checks": found}
    return JSONResponse(document, status_code=200 if ready else 503)


def _said(check: Callable[[Gateway], None], gateway: Gateway) -> str:
    try:
        check(gateway)
    except RowmillError as error:  # anybody may ask: the details are for the log
        log.warning("not ready: %s: %s", type(error).__name__, error, action=Action.GATEWAY_NOT_READY)
        return type(error).__name__
    except Exception:
        log.exception("not ready", action=Action.GATEWAY_NOT_READY)
        return "unexpected"
    return "ok"


def _database(gateway: Gateway) -> None:
    if (gap := gateway.database.schema_gap()) is not None:
        raise RowmillError(gap)


def _object_store(gateway: Gateway) -> None:
    store = ObjectStore(gateway.settings.storage_options, retry_seconds=_STORE_SECONDS)
    try:
        store.exists(f"{gateway.settings.effective_files_dir}/ready")
    finally:
        store.close()


def _broker(gateway: Gateway) -> None:
    gateway.session.wakeups.check()


def _engine(gateway: Gateway) -> None:
    """An engine is installed, and the files of every active model are there. Nothing is loaded."""
    if gateway.runner is None or not gateway.runner.is_alive():
        raise RowmillError("the thread that runs the jobs has ended")
    active = [item for item in revisions.listed(gateway.database) if item.state is RevisionState.ACTIVE]
    if not active:
        return  # the engine ``fake`` is always there
    if not registry.installed() and any(item.place != "fake" for item in active):
        raise InvalidModel("no engine is installed: pip install 'rowmill[onnx]' or 'rowmill[vllm]'")
    for revision in active:
        try:
            gateway.runtime.models.model(revision)
        except InvalidModel as error:
            raise NotFound(f"model {revision.reference}: {error}") from error
