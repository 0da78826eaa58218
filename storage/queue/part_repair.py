"""Flushed files that are no longer what they were: forgotten, so that their rows are computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from pyroaring import BitMap

from storage.queue.attempts import held_row
from storage.records import Claim, PartFile
from storage.sql import tables
from storage.sql.database import Database, pack
from storage.sql.transitions import record


def forget_parts(
    database: Database,
    claim: Claim,
    damaged: Sequence[PartFile],
    kept: Sequence[PartFile],
    *,
    tokens: Mapping[str, int],
) -> None:
    """Take back what the ``damaged`` part files had made durable; ``tokens`` are the totals of those ``kept``.

    Fenced: raises :class:`LeaseLost`, and nothing has changed, when the attempt no longer holds the shard.
    """
    done = BitMap.union(BitMap(), *(part.rows for part in kept))
    failed = BitMap.union(BitMap(), *(part.failed for part in kept))
    shard, part, exception = tables.shard, tables.part_file, tables.row_exception
    with database.write() as connection:
        held_row(database, connection, claim)
        connection.execute(
            part.delete().where(
                part.c.shard_id == claim.shard.id,
                sa.tuple_(part.c.attempt_no, part.c.seq).in_([(item.attempt_no, item.seq) for item in damaged]),
            )
        )
        known = sa.select(exception.c.row_idx).where(exception.c.shard_id == claim.shard.id)
        stale = [row for row in connection.execute(known).scalars() if row not in failed]
        connection.execute(
            exception.delete().where(exception.c.shard_id == claim.shard.id, exception.c.row_idx.in_(stale))
        )
        connection.execute(
            shard.update()
            .where(shard.c.id == claim.shard.id)
            .values(done_bm=pack(done), failed_bm=pack(failed), n_done=len(done), n_failed=len(failed), **tokens)
        )
        for item in damaged:
            record(
                connection,
                claim.job.id,
                "shard.part_lost",
                claim.owner,
                shard_id=claim.shard.id,
                attempt_no=claim.attempt_no,
                data={"uri": item.uri, "rows": len(item.rows)},
            )
