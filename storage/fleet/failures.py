"""Failed rows as the shards tell them: which there are, and where the reasons lie."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import sqlalchemy as sa

from storage.records import PartFile, Shard
from storage.sql import tables
from storage.sql.database import Database

_PAGE = 200


def failing(database: Database, job_id: str) -> Iterator[list[Shard]]:
    """For each position with failed rows all generations of its shard, oldest first; in the order of positions.

    The newest one says what is true now: a row that is being computed once more has not failed. One page of positions
    is in memory at a time.
    """
    table = tables.shard
    mine = table.c.job_id == job_id
    failing = sa.select(table.c.idx).where(mine, table.c.n_failed > 0).distinct()
    for page in database.pages(failing, table.c.idx, _PAGE):
        positions = [row.idx for row in page]
        query = sa.select(table).where(mine, table.c.idx.in_(positions)).order_by(table.c.idx, table.c.gen)
        for _, group in groupby(database.records(Shard, query), key=lambda shard: shard.idx):
            generations = list(group)
            if generations[-1].failed:
                yield generations


def exceptions(database: Database, shard_id: str) -> dict[int, tuple[str, str]]:
    """Row index in the shard → code and message: of the first failures only (``shards.ROW_EXCEPTIONS_KEPT``)."""
    table = tables.row_exception
    query = sa.select(table.c.row_idx, table.c.code, table.c.message).where(table.c.shard_id == shard_id)
    return {row.row_idx: (row.code, row.message) for row in database.rows(query)}


def files(database: Database, shard_id: str) -> list[PartFile]:
    """The files that attempts at the shard have flushed or committed, the newest first."""
    part = tables.part_file
    query = sa.select(part).where(part.c.shard_id == shard_id).order_by(part.c.attempt_no.desc(), part.c.seq.desc())
    return database.records(PartFile, query)
