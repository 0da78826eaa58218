"""The tasks: each wakes the worker up, which looks for the work in the database."""

from __future__ import annotations

from storage.broker import FINALIZE, PLAN, RUN, TICK
from tasks.app import app, worker


@app.task(name=PLAN)
def plan() -> None:
    worker().wake_up(PLAN)


@app.task(name=RUN)
def run(queue: str) -> None:
    """``queue`` is for people who look at the broker: the worker looks at all of its own."""
    worker().wake_up(RUN)


@app.task(name=FINALIZE)
def finalize() -> None:
    worker().wake_up(FINALIZE)


@app.task(name=TICK)
def tick() -> None:
    """Beat fires it."""
    worker().wake_up(TICK)
