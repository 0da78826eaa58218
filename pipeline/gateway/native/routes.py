"""``/api/v1``: the verbs of the Python client over HTTP."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
