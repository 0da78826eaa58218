"""``rowmill job errors``: the failed rows of a job, all of them, page by page."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli import output
from pipeline.cli.command import Invocation, command
from pipeline.cli.job.ids import JobId


@command
def list_errors(
    invocation: Invocation,
    job: JobId,
    limit: Annotated[int, typer.Option("-n", "--limit", min=0, metavar="N", help="At most this many; 0 is all.")] = 100,
    after: Annotated[
        int | None, typer.Option(min=0, metavar="ROW", help="Only rows behind this one: the page that follows.")
    ] = None,
) -> None:
    """The failed rows, in input order: number, code, message.

    They are read from the output; while the job runs, from what it has flushed so far. With --json: how many failed in
    all (total), whether there are more behind these (more), and the row to go on from with --after (after).
    """
    with invocation.client() as client:
        handle = client.job(job)
        rows = handle.errors(limit=limit + 1 if limit else None, after=after)
        found, total = list(rows), rows.total
    more = bool(limit) and len(found) > limit
    found = found[:limit] if limit else found
    last = found[-1].row if more else None
    if invocation.as_json:
        document = [{"row": item.row, "code": item.code, "message": item.message} for item in found]
        output.emit_json({"job": handle.id, "errors": document, "total": total, "more": more, "after": last})
        return
    if not found:
        invocation.notice("no failed rows" + (f" behind row {after}; {total:,} in all" if total else ""))
        return
    output.emit(output.table(("row", "code", "message"), [(e.row, e.code, e.message) for e in found], right=("row",)))
    if more:
        invocation.notice(f"{len(found):,} of {total:,}; go on with --after {last}, or see all with --limit 0")
