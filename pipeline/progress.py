"""A progress bar for ``wait(progress=True)`` in scripts and notebooks, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.status import JobStatus


@contextmanager
def shown(on: bool) -> Iterator[Callable[[JobStatus], None]]:
    """Yield a function that takes each new status; it draws only when ``on``."""
    if not on:
        yield lambda status: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)

        def show(status: JobStatus) -> None:
            total = status.rows_total or None
            bar.update(task, description=status.state.value, total=total, completed=status.rows_done)

        yield show
