"""Finding jobs for people: by the beginning or the end of an id, and page by page under filters."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from storage.errors import NotFound
from storage.records import Job
from storage.sql import tables
from storage.sql.database import Database
from storage.states import TERMINAL_JOB, JobState

SHORT = 8
"""Characters at the end of an id that are shown in its place. They are random; the beginning is the time, which jobs
made in the same minute share."""
_LENGTHS = (SHORT, 12, 17, 22)
"""Longer ends of an id (up to its dashes), for ids whose short ends are alike."""
_NAMED = 5


def find(database: Database, part: str, *, tenant: str | None = None) -> Job:
    """The one job (of a tenant) whose id is ``part``, or begins or ends with it.

    Raises :class:`NotFound` when there is none, or more than one.
    """
    if not part:
        raise NotFound("a job's id is missing: it is empty, which would fit every job")
    job = tables.job
    there = sa.select(job).where(job.c.deleted_at.is_(None))
    if tenant is not None:
        there = there.where(job.c.tenant == tenant)
    fits = sa.or_(job.c.id.startswith(part, autoescape=True), job.c.id.endswith(part, autoescape=True))
    if (exact := database.record(Job, there.where(job.c.id == part))) is not None:
        return exact
    found = database.records(Job, there.where(fits).order_by(job.c.id).limit(_NAMED + 1))
    if len(found) == 1:
        return found[0]
    if found:
        more = ", …" if len(found) > _NAMED else ""
        named = ", ".join(row.id for row in found[:_NAMED])
        raise NotFound(f"{part!r} begins or ends the id of more than one job ({named}{more}); give more of it")
    raise NotFound(f"there is no job {part!r}")


def short_ids(database: Database, ids: Sequence[str]) -> dict[str, str]:
    """For each id its shortest end, of ``SHORT`` characters or more, that no other job's id begins or ends with."""
    left = set(ids)
    found: dict[str, str] = {}
    for length in _LENGTHS:
        ends = {item[-length:]: item for item in left}
        counts = dict.fromkeys(ends, 0)
        job = tables.job
        for piece in (
            sa.func.substr(job.c.id, sa.func.length(job.c.id) - (length - 1)),
            sa.func.substr(job.c.id, 1, length),
        ):
            query = sa.select(piece, sa.func.count()).where(piece.in_(ends)).group_by(piece)
            for end, count in database.rows(query):
                counts[end] += count
        settled = {item: end for end, item in ends.items() if counts[end] == 1}
        found |= settled
        left -= settled.keys()
        if not left:
            break
    return found | {item: item for item in left}


def listed(
    database: Database,
    *,
    state: JobState | None = None,
    tenant: str | None = None,
    output_uri: str | None = None,
    since: float | None = None,
    before: float | None = None,
    limit: int = 20,
    after: str | None = None,
) -> list[Job]:
    """Jobs, newest first; ``after`` is the id of the last one of the page before.

    ``output_uri`` narrows them to those that write there or below. ``since`` and ``before`` are Unix seconds by the
    database's clock: jobs submitted at ``since`` or later, and earlier than ``before``.
    """
    job = tables.job
    wanted: list[sa.ColumnElement[bool]] = [job.c.deleted_at.is_(None)]
    if state is not None:
        wanted.append(job.c.state == state)
    if tenant is not None:
        wanted.append(job.c.tenant == tenant)
    if output_uri is not None:
        below = job.c.output_uri.startswith(output_uri.rstrip("/") + "/", autoescape=True)
        wanted.append(sa.or_(job.c.output_uri == output_uri, below))
    if since is not None:
        wanted.append(job.c.created_at >= since)
    if before is not None:
        wanted.append(job.c.created_at < before)
    if after is not None:
        wanted.append(job.c.id < after)
    query = sa.select(job).where(*wanted).order_by(job.c.id.desc()).limit(limit)
    return database.records(Job, query)


def live(database: Database, *, without: Sequence[str] = (), limit: int) -> list[str]:
    """Ids of jobs that have not ended: the highest priority first, then the oldest."""
    job = tables.job
    # Written out, as the partial index has them.
    ended: list[sa.ColumnElement[str]] = [sa.literal_column(f"'{state}'") for state in sorted(TERMINAL_JOB)]
    query = (
        sa.select(job.c.id)
        .where(job.c.state.not_in(ended), job.c.deleted_at.is_(None), job.c.id.not_in(without))
        .order_by(job.c.priority.desc(), job.c.id)
        .limit(limit)
    )
    return database.scalars(query)
