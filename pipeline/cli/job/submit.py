"""``rowmill job submit`` and ``estimate``: a job for a fleet, and how large it would be."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli import errors, output, streams
from pipeline.cli.command import Invocation, command
from pipeline.cli.job.commands import app, wait_until_ended
from pipeline.cli.job.fields import with_job_fields


@app.command()
@command
@with_job_fields
def submit(
    invocation: Invocation,
    fields: dict[str, Any],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended, as 'job wait' does.")] = False,
) -> int:
    """Queue a job for the workers, print its id, and come back.

    What this machine can reach is checked first; a worker reads the input. A broker that is away delays the job and
    loses nothing. Without a broker at all the job waits for 'rowmill job wait' or 'rowmill job resume'.

    Example: rowmill job submit 's3://in/*.parquet' -o s3://out/1 -m /models/llama -t generate -p "Say: {text}"
    """
    with invocation.client() as client:
        handle = client.submit(start=False, on_notice=invocation.notice, **fields)
        invocation.job_id = handle.id
        if wait:
            return wait_until_ended(invocation, handle)
        status = handle.status()
    with streams.reader_may_leave():
        invocation.show({"job": status.to_json()}, status.id)
    if invocation.loaded.settings.broker_url is None:
        invocation.notice(
            f"no broker_url is set, so no worker will take it; to run it here: rowmill job wait {status.id}"
        )
    return errors.OK


@app.command()
@command
@with_job_fields
def estimate(invocation: Invocation, fields: dict[str, Any]) -> None:
    """How many rows, bytes and shards a job would have, from its input's footers. Nothing is queued.

    Input that is not Parquet is read whole for it.
    """
    with invocation.client() as client:
        found = client.estimate(**fields)
    facts = [
        ("files", f"{found.files:,}"),
        ("rows", f"{found.rows:,}"),
        ("bytes", output.size(found.n_bytes) + ", uncompressed"),
        ("shards", f"{found.shards:,}"),
        ("engine", found.engine),
        ("columns read", ", ".join(found.columns)),
    ]
    invocation.show({"estimate": found.to_json()}, output.pairs(facts))
