"""``rowmill admin``: what an operator looks at and sets going. Nothing here goes around the state machines."""

from __future__ import annotations

import math
from contextlib import closing
from typing import TYPE_CHECKING

import typer

from pipeline.cli import output
from pipeline.cli.command import Invocation, command

if TYPE_CHECKING:
    from pipeline.process.runtime import Runtime

app = typer.Typer(help="For operators: queues, lost shards, garbage.", no_args_is_help=True)


@app.command()
@command
def queues(invocation: Invocation) -> None:
    """Shards by queue and state."""
    from storage.fleet import reports

    with closing(_runtime(invocation)) as runtime:
        counts = reports.shards_by_queue(runtime.database)
    states = ("ready", "running", "committed", "failed", "cancelled")
    lines = [[queue, *(f"{found.get(state, 0):,}" for state in states)] for queue, found in sorted(counts.items())]
    invocation.show_table({"queues": counts}, ("queue", *states), lines, right=states, none="no shards")


@app.command()
@command
def reap(invocation: Invocation) -> None:
    """Take back the shards whose worker died or whose lease ran out, and wind down jobs whose window has passed.

    Workers and beat do this by themselves. This command does it now, also for a database without them.
    """
    from pipeline.worker import maintenance

    with closing(_runtime(invocation)) as runtime:
        found = [maintenance.recover_local(runtime), maintenance.reap(runtime)]
        expired = maintenance.expire(runtime)
    ready, failed = sum(item.ready for item in found), sum(item.failed for item in found)
    invocation.show(
        {"ready": ready, "given_up": failed, "expired_jobs": expired},
        f"{ready} shards are ready again, {failed} have failed, {len(expired)} jobs have expired",
    )


@app.command()
@command
def gc(invocation: Invocation) -> None:
    """Delete the files of ended attempts whose retention is over, and cached results that are old or too many.

    Jobs that ended longer ago than job_retention_days are deleted, too. The other limits are settings as well:
    attempt_retention_hours, result_cache_days and result_cache_bytes.
    """
    from pipeline.worker import maintenance

    with closing(_runtime(invocation)) as runtime:
        deleted = maintenance.collect_garbage(runtime, budget=math.inf)
        jobs = maintenance.delete_jobs(runtime, budget=math.inf)
        files, n_bytes = maintenance.collect_results(runtime)
    invocation.show(
        {"deleted": deleted, "deleted_jobs": jobs, "result_cache": {"files": files, "bytes": n_bytes}},
        f"{deleted} locations were deleted\n"
        f"{output.plural(jobs, 'ended job')} past the retention deleted\n"
        f"{files} files of cached results were deleted ({output.size(n_bytes)})",
    )


def _runtime(invocation: Invocation) -> Runtime:
    from pipeline.process.runtime import start

    return start(invocation.loaded.settings)
