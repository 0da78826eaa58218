"""``rowmill job errors``: the failed rows of a job, all of them, page by page."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.command import Invocation, command
from pipeline.cli.job.ids import JobId
from pipeline.client import documents


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
        page = documents.failed_rows(client.job(job), limit or None, after)
    found, total, columns = page["errors"], page["total"], ("row", "code", "message")
    none = "no failed rows" + (f" behind row {after}; {total:,} in all" if total else "")
    invocation.show_table(page, columns, [list(item.values()) for item in found], right=("row",), none=none)
    if page["more"] and not invocation.as_json:
        invocation.notice(f"{len(found):,} of {total:,}; go on with --after {page['after']}, or see all with --limit 0")
