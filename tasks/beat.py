"""The task that beat fires."""

from __future__ import annotations

from storage.broker import TICK
from tasks.app import app, worker


@app.task(name=TICK)
def tick() -> None:
    worker().wake_up(TICK)
