"""The task that beat fires."""

from __future__ import annotations

from storage.wakeups import TICK
from tasks.app import app, worker


@app.task(name=TICK)
def tick() -> None:
    worker().wake_up(TICK)
