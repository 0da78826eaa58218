"""The task about shards."""

from __future__ import annotations

from storage.broker import RUN
from tasks.app import app, worker


@app.task(name=RUN)
def run(queue: str) -> None:
    """``queue`` is for people who look at the broker: the worker looks at all of its own."""
    worker().wake_up(RUN)
