"""``/v1``: OpenAI's batch API."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
