"""Reports of validations, stored with the revision that they are about."""

from __future__ import annotations

import sqlalchemy as sa

from storage.errors import NotFound
from storage.registry.records import Report, Revision
from storage.sql import tables
from storage.sql.database import Database, now

PASS, FAIL, INSUFFICIENT = "PASS", "FAIL", "INSUFFICIENT"
_report = tables.model_report


def insert(connection: sa.Connection, revision_id: str, report: Report) -> None:
    """Store a report; its time is the database's."""
    connection.execute(
        _report.insert().values(
            id=report.id,
            revision_id=revision_id,
            verdict=report.verdict,
            at=now(),
            actor=report.actor,
            document=dict(report.document),
        )
    )


def newest(connection: sa.Connection, revision_id: str) -> Report | None:
    """The newest report on a revision, if any."""
    query = sa.select(_report).where(_report.c.revision_id == revision_id).order_by(_report.c.id.desc())
    row = connection.execute(query).first()
    return None if row is None else _record(row)


def of_revision(database: Database, revision: Revision) -> list[Report]:
    """All reports on a revision, the newest first."""
    query = sa.select(_report).where(_report.c.revision_id == revision.id).order_by(_report.c.id.desc())
    with database.read() as connection:
        return [_record(row) for row in connection.execute(query)]


def get(database: Database, report_id: str) -> Report:
    """A report by its id, or :class:`NotFound`."""
    with database.read() as connection:
        row = connection.execute(sa.select(_report).where(_report.c.id == report_id)).first()
    if row is None:
        raise NotFound(f"there is no report {report_id}; 'rowmill model show NAME' lists those of a model")
    return _record(row)


def _record(row: sa.Row[tuple[object, ...]]) -> Report:
    return Report(row.id, row.verdict, row.at, row.actor, row.document)
