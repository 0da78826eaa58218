"""The ASGI application of the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from pipeline.config.settings import Settings
from pipeline.gateway import errors, health
from pipeline.gateway.context import Gateway
from pipeline.gateway.middleware import Requests
from pipeline.gateway.native import routes as native
from pipeline.gateway.openai import routes as openai


def create_app(settings: Settings, *, embedded: bool = False) -> FastAPI:
    """The application; its lifespan opens database and object store. ``embedded``: it also runs the jobs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gateway = await run_in_threadpool(Gateway, settings, embedded=embedded)
        app.state.gateway = gateway
        try:
            yield
        finally:
            await run_in_threadpool(gateway.close)

    app = FastAPI(
        title="Rowmill",
        version=version("rowmill"),
        summary="Batch inference: OpenAI's batch API under /v1, Rowmill's own under /api/v1.",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would lose the body of some clients
    )
    errors.install(app)
    app.add_middleware(Requests)
    app.include_router(health.router)
    app.include_router(native.router, prefix="/api/v1")
    app.include_router(openai.router, prefix="/v1")
    return app
