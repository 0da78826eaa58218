"""Builders for tests of the database layer: planned jobs, part files, and a look at what is stored."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
import uuid_utils
from pyroaring import BitMap

from storage.queue import claims, jobs
from storage.records import OUTPUT_SEQ, Claim, Job, NewJob, PartFile, ShardPlan, Slice, Source
from storage.sql import tables
from storage.sql.database import Database

OWNER = "worker-1"
LEASE = 60.0


def new_job(**values: Any) -> NewJob:
    job_id = values.pop("id", str(uuid_utils.uuid7()))
    given: dict[str, Any] = {
        "tenant": "default",
        "priority": 0,
        "queue": "fake",
        "engine": "fake",
        "engine_key": "key",
        "spec": {"task": "generate"},
        "spec_hash": "hash",
        "idempotency_key": None,
        "output_uri": f"/out/{job_id}",
        "max_failed_rows": None,
    }
    return NewJob(id=job_id, **(given | values))


def unplanned_job(
    database: Database, *, window_seconds: float = 3600.0, actor: str = "test", new_tenant: bool = True, **values: Any
) -> Job:
    new = new_job(**values)
    return jobs.insert(database, new, window_seconds=window_seconds, actor=actor, new_tenant=new_tenant)


def planned_job(database: Database, *, shards: int = 2, rows: int = 10, **values: Any) -> Job:
    job_id = unplanned_job(database, **values).id
    source = Source(0, "/in.parquet", "etag", 1000, shards * rows)
    plans = [ShardPlan(i, i * rows, rows, 100, (Slice(0, i * rows, rows),)) for i in range(shards)]
    return jobs.set_planned(database, job_id, plan={"planned": True}, sources=[source], shards=plans, actor="test")


def take(database: Database, job: Job, owner: str = OWNER, lease: float = LEASE) -> Claim:
    claim = claims.claim(database, owner=owner, lease_seconds=lease, job_id=job.id)
    assert claim is not None
    return claim


def part(claim: Claim, rows: list[int], *, seq: int = 0, failed: tuple[int, ...] = ()) -> PartFile:
    uri = f"/out/{claim.shard.id}/{claim.attempt_no}-{seq}"
    return PartFile(claim.attempt_no, seq, uri, 10, "sha", "etag", BitMap(rows), BitMap(failed))


def output(claim: Claim, failed: tuple[int, ...] = ()) -> PartFile:
    return part(claim, list(range(claim.shard.row_n)), seq=OUTPUT_SEQ, failed=failed)


def stored(database: Database, table: str, **where: Any) -> list[sa.Row[Any]]:
    source = tables.metadata.tables[table]
    query = sa.select(source).where(*(source.c[name] == value for name, value in where.items()))
    with database.read() as connection:
        return list(connection.execute(query))


def expire_lease(database: Database, claim: Claim) -> None:
    """As if the worker had been silent for longer than its lease."""
    with database.write() as connection:
        connection.execute(tables.shard.update().where(tables.shard.c.id == claim.shard.id).values(lease_until=1.0))
