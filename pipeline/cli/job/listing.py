"""``rowmill job list``: jobs as a table that fits the terminal."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from pipeline.cli import output, values
from pipeline.cli.command import Invocation, command
from pipeline.cli.job.ids import complete_job
from pipeline.spec.status import JobStatus

StateName = Literal[
    "validating", "queued", "in_progress", "finalizing", "cancelling", "completed", "failed", "cancelled", "expired"
]
_COLUMNS = ("id", "state", "tenant", "task", "model", "rows", "done", "failed", "age", "output")
_RIGHT = ("rows", "done", "failed", "age")
_SHRINK = {"output": 12, "model": 8, "tenant": 7}
"""Columns that may be cut, in this order, and the cells that each keeps at least."""
_LEAVE_OUT = ("model", "task", "output", "age", "failed")
"""Columns that go, in this order, where cutting is not enough."""


@command
def list_jobs(
    invocation: Invocation,
    state: Annotated[StateName | None, typer.Option("-s", "--state", help="Only jobs in this state.")] = None,
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only this tenant's jobs.")] = None,
    out: Annotated[
        str | None, typer.Option("-o", "--output", metavar="DIR", help="Only jobs that write there or below.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only jobs submitted since: 2026-11-30T12:00, or 90m, 24h, 7d ago."),
    ] = None,
    before: Annotated[str | None, typer.Option(metavar="TIME", help="Only jobs submitted earlier than that.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=1000, metavar="N", help="At most this many.")] = 20,
    after: Annotated[
        str | None,
        typer.Option(metavar="JOB", help="Only jobs older than this one.", autocompletion=complete_job),
    ] = None,
    wide: Annotated[bool, typer.Option("-w", "--wide", help="Whole ids, and no column cut to fit.")] = False,
) -> None:
    """Jobs, the newest first.

    An id is shown by its end, which every command accepts. On a terminal the columns are cut to fit it.
    """
    now = time.time()
    window = {
        name: None if text is None else values.moment(text, f"--{name}", now)
        for name, text in (("since", since), ("before", before))
    }
    with invocation.client() as client:
        found = client.jobs(state=state, tenant=tenant, output=out, limit=limit, after=after, **window)
        short = client.short_ids([status.id for status in found]) if found and not wide else {}
    if invocation.as_json:
        last = found[-1].id if len(found) == limit else None
        output.emit_json({"jobs": [status.to_json() for status in found], "after": last})
        return
    if not found:
        invocation.notice("no jobs" + (" that fit" if state or tenant or out or since or before or after else ""))
        return
    rows = [_row(status, short.get(status.id, status.id), now) for status in found]
    columns, lines = list(_COLUMNS), rows
    if not wide and (cells := output.terminal_width()) is not None:
        columns, lines = output.fitted(_COLUMNS, rows, cells, shrink=_SHRINK, leave_out=_LEAVE_OUT)
    output.emit(output.table(columns, lines, right=[name for name in _RIGHT if name in columns]))
    if any(status.interrupted for status in found):
        invocation.notice("interrupted: nobody is running it; resume with 'rowmill job resume ID'")


def _row(status: JobStatus, shown: str, now: float) -> list[str]:
    counts = [f"{n:,}" for n in (status.rows_total, status.rows_done, status.rows_failed)]
    age = output.duration(now - status.created_at, short=True)
    state = "interrupted" if status.interrupted else status.state.value
    return [shown, state, status.tenant, status.task, status.model, *counts, age, status.output]
