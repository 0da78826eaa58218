"""The task that does the work."""

from __future__ import annotations

from storage.wakeups import RUN
from tasks.app import app, worker


@app.task(name=RUN)
def run(queue: str) -> None:
    worker().run(queue)
