"""``/v1``: OpenAI's batch API."""

from __future__ import annotations

from fastapi import APIRouter

from pipeline.gateway.openai import batch_routes, file_routes, model_routes

router = APIRouter()
for _routes in (file_routes, batch_routes, model_routes):
    router.include_router(_routes.router)
