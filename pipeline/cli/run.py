"""``rowmill run``: one job from its input to its output, in this process."""

from __future__ import annotations

from typing import Any

from pipeline.cli.command import Invocation, command
from pipeline.cli.foreground import foreground
from pipeline.cli.job.fields import with_job_fields


@command
@with_job_fields
def run(invocation: Invocation, fields: dict[str, Any]) -> int:
    """Run a model over every row, here and now; the same command resumes an interrupted run.

    Values of KEY=VALUE are JSON where they can be (64, 0.5, true, ["a"]), text otherwise.

    Example: rowmill run prompts.parquet -o out -m ./llama -t generate -p "Say: {text}" --sampling max_tokens=16
    """
    return foreground(invocation, lambda client, hooks: client.run(**hooks, **fields))
