"""``/api/v1``: the verbs of the Python client over HTTP."""

from __future__ import annotations

from fastapi import APIRouter

from pipeline.gateway.native import jobs, operate, schedules

router = APIRouter()
for room in (jobs, schedules, operate):
    router.include_router(room.router)
