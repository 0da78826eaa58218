"""Tasks about whole jobs."""

from __future__ import annotations

from storage.broker import FINALIZE, PLAN
from tasks.app import app, worker


@app.task(name=PLAN)
def plan() -> None:
    worker().wake_up(PLAN)


@app.task(name=FINALIZE)
def finalize() -> None:
    worker().wake_up(FINALIZE)
