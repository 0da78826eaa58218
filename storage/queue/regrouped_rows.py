"""Which rows of its input a job's shards hold, where they do not follow each other as the input's rows do.

Such a job was regrouped: its shards lie over chunks, whose sources say which rows each holds, in rising order. Shards
count through the chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from pyroaring import BitMap

from storage.records import Shard, Source
from storage.sql import tables
from storage.sql.database import Database

_PAGE = 100
_source = tables.source


def chunks(database: Database, job_id: str) -> list[str]:
    """The URIs of the job's chunks; none for a job that was not regrouped."""
    query = sa.select(_source.c.uri).where(_source.c.job_id == job_id, _source.c.rows.is_not(None))
    return database.scalars(query)


def sources(database: Database, job_id: str) -> list[Source]:
    """The files that the job's shards may read: its input, or chunks made of it, in row order; then regrouped ones."""
    query = sa.select(_source).where(_source.c.job_id == job_id).order_by(_source.c.idx)
    return database.records(Source, query)


def regrouped(database: Database, job_id: str) -> bool:
    query = sa.select(_source.c.idx).where(_source.c.job_id == job_id, _source.c.rows.is_not(None)).limit(1)
    return database.row(query) is not None


def of_shard(database: Database, shard: Shard) -> BitMap | None:
    """The rows of the input that a shard holds, in its order; ``None``: the ``row_n`` rows from ``row_start`` on."""
    if len(shard.slices) != 1:
        return None
    piece = shard.slices[0]
    query = sa.select(_source.c.rows).where(_source.c.job_id == shard.job_id, _source.c.idx == piece.source)
    held = database.scalar(query)
    return None if held is None else held[piece.row_lo : piece.row_lo + piece.row_n]


def position(database: Database, job_id: str, row: int) -> int:
    """Where row ``row`` of the input comes in the count of the job's shards. Looks through the job's chunks."""
    before = 0
    for n_rows, held in _chunks(database, job_id):
        if row in held:
            return before + held.rank(row) - 1
        before += n_rows
    return row


def _chunks(database: Database, job_id: str) -> Iterator[tuple[int, BitMap]]:
    query = sa.select(_source.c.idx, _source.c.n_rows, _source.c.rows)
    regrouped = (_source.c.job_id == job_id, _source.c.rows.is_not(None))
    for page in database.pages(query.where(*regrouped), _source.c.idx, _PAGE):
        yield from ((row.n_rows, row.rows) for row in page)
