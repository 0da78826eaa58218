"""Reports of validations, stored with the revision that they are about."""

from __future__ import annotations

import sqlalchemy as sa

from storage.errors import NotFound
from storage.registry.records import Report, Revision
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read, values

PASS, FAIL, INSUFFICIENT = "PASS", "FAIL", "INSUFFICIENT"
_report = tables.model_report


def insert(connection: sa.Connection, revision_id: str, report: Report) -> None:
    """Store a report; its time is the database's."""
    connection.execute(_report.insert().values(values(report) | {"revision_id": revision_id, "at": now()}))


def newest(connection: sa.Connection, revision_id: str) -> Report | None:
    """The newest report on a revision, if any."""
    query = sa.select(_report).where(_report.c.revision_id == revision_id).order_by(_report.c.id.desc())
    row = connection.execute(query).first()
    return None if row is None else read(Report, row)


def of_revision(database: Database, revision: Revision) -> list[Report]:
    """All reports on a revision, the newest first."""
    query = sa.select(_report).where(_report.c.revision_id == revision.id).order_by(_report.c.id.desc())
    return database.records(Report, query)


def get(database: Database, report_id: str) -> Report:
    """A report by its id, or :class:`NotFound`."""
    found = database.record(Report, sa.select(_report).where(_report.c.id == report_id))
    if found is None:
        raise NotFound(f"there is no report {report_id}; 'rowmill model show NAME' lists those of a model")
    return found
