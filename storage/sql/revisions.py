"""The schema's revisions, by the names of the migrations' files: whoever only compares them need not load Alembic."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from storage.sql.tables import metadata

TABLE = "alembic_version"
"""Where Alembic notes a database's revision."""
MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


def known() -> list[str]:
    """The revisions of this version, oldest first. They follow each other in one line: a file is called
    ``<revision>_<what it does>.py``."""
    return sorted(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*_*.py"))


def newest() -> str:
    """The revision that this version needs."""
    return known()[-1]


def before(revision: str | None) -> list[str]:
    """The revisions that this version knows before ``revision``, the newest of them first."""
    found = known()
    return found[: found.index(revision)][::-1] if revision in found else []


def create(connection: sa.Connection) -> None:
    """Make the newest schema in a database that has no tables of ours: what all migrations make of it, in less time.

    The database raises that a table "already exists" when it is another program's.
    """
    metadata.create_all(connection, checkfirst=False)
    version = sa.Table(
        TABLE,
        sa.MetaData(),
        sa.Column("version_num", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("version_num", name=f"{TABLE}_pkc"),
    )
    version.create(connection, checkfirst=False)
    connection.execute(version.insert().values(version_num=newest()))
