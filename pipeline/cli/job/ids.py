"""The argument that names a job, and the ids that a shell completes it to."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

_COMPLETED = 100
"""Newest jobs whose ids are offered."""


def complete_job(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Ids of the newest jobs that begin with ``incomplete``, short ones first, each with what the job is.

    A completion must never print or fail: without a database, or with one that does not answer, there are none. An
    embedded database is not made, nor brought up to date.
    """
    with suppress(Exception):
        return _ids(ctx.params, incomplete)
    return []


def _ids(given: dict[str, Any], incomplete: str) -> list[tuple[str, str]]:
    from pipeline.config.settings import load_settings
    from storage.fleet import job_lookup
    from storage.sql.database import Database

    values = {name: given[name] for name in ("data_dir", "database_url") if given.get(name) is not None}
    settings = load_settings(values).settings
    if settings.database_url is None and not (Path(settings.data_dir) / "rowmill.db").exists():
        return []
    database = Database(settings.effective_database_url)
    try:
        found = job_lookup.listed(database, limit=_COMPLETED)
        short = job_lookup.short_ids(database, [job.id for job in found])
    finally:
        database.close()
    offered: list[tuple[str, str]] = []
    for job in found:
        name = next((text for text in (short[job.id], job.id) if text.startswith(incomplete)), None)
        if name is not None:
            offered.append((name, f"{job.state} {job.spec['task']} {job.output_uri}"))
    return offered


JobId = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A job's id, or an unambiguous beginning or end of it.", autocompletion=complete_job
    ),
]
JobIds = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB...", help="Jobs' ids, or unambiguous beginnings or ends of them.", autocompletion=complete_job
    ),
]
