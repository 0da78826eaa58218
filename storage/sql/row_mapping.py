"""Table rows as records."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from storage.records import Attempt, Fire, Job, PartFile, Schedule, Shard, Slice, Source
from storage.sql.database import unpack
from storage.states import AttemptState, FireState, JobState, ShardState

Row = sa.Row[Any]


def job(row: Row) -> Job:
    return Job(
        id=row.id,
        tenant=row.tenant,
        state=JobState(row.state),
        priority=row.priority,
        queue=row.queue,
        engine=row.engine,
        engine_key=row.engine_key,
        spec=row.spec,
        spec_hash=row.spec_hash,
        idempotency_key=row.idem_key,
        plan=row.plan,
        output_uri=row.output_uri,
        stop_reason=row.stop_reason,
        error=row.error,
        gen=row.gen,
        n_shards=row.n_shards,
        n_open=row.n_open,
        n_dead=row.n_dead,
        rows_total=row.rows_total,
        rows_done=row.rows_done,
        rows_failed=row.rows_failed,
        tokens=tokens(row),
        max_failed_rows=row.max_failed_rows,
        finalize_epoch=row.finalize_epoch,
        publishing=row.publishing,
        touched=row.touched,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        expires_at=row.expires_at,
        cancel_requested_at=row.cancel_requested_at,
        model=row.model,
    )


def shard(row: Row) -> Shard:
    return Shard(
        id=row.id,
        job_id=row.job_id,
        idx=row.idx,
        gen=row.gen,
        state=ShardState(row.state),
        row_start=row.row_start,
        row_n=row.row_n,
        slices=tuple(Slice(*item) for item in row.slices),
        select=None if row.select_bm is None else unpack(row.select_bm),
        done=unpack(row.done_bm),
        failed=unpack(row.failed_bm),
        attempt_no=row.attempt_no,
        committed_attempt=row.committed_attempt,
        n_fail=row.n_fail,
        n_lost=row.n_lost,
        n_crash=row.n_crash,
        suspect=None if row.suspect_bm is None else unpack(row.suspect_bm),
        run_after=row.run_after,
        lease_owner=row.lease_owner,
        lease_until=row.lease_until,
        error=row.error,
    )


def source(row: Row) -> Source:
    held = None if row.rows_bm is None else unpack(row.rows_bm)
    return Source(row.idx, row.uri, row.etag, row.n_bytes, row.n_rows, row.partition, held)


def part_file(row: Row) -> PartFile:
    return PartFile(
        attempt_no=row.attempt_no,
        seq=row.seq,
        uri=row.uri,
        n_bytes=row.n_bytes,
        sha256=row.sha256,
        etag=row.etag,
        rows=unpack(row.rows_bm),
        failed=unpack(row.failed_bm),
    )


def attempt(row: Row) -> Attempt:
    return Attempt(
        shard_id=row.shard_id,
        attempt_no=row.attempt_no,
        worker_id=row.worker_id,
        state=AttemptState(row.state),
        started_at=row.started_at,
        ended_at=row.ended_at,
        rows_resumed=row.rows_resumed,
        rows_computed=row.rows_computed,
        stats=row.stats,
        error=row.error,
    )


def tokens(row: Row) -> dict[str, int]:
    return {
        "prompt_tokens": int(row.prompt_tokens),
        "cached_tokens": int(row.cached_tokens),
        "completion_tokens": int(row.completion_tokens),
    }


def schedule(row: Row) -> Schedule:
    return Schedule(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        cron=row.cron,
        tz=row.tz,
        spec=row.spec,
        overlap=row.overlap,
        misfire=row.misfire,
        misfire_grace=row.misfire_grace,
        incremental=row.incremental,
        paused=row.paused,
        next_at=row.next_at,
        created_at=row.created_at,
    )


def fire(row: Row) -> Fire:
    """``row`` holds the fire's columns and ``job_state``."""
    return Fire(
        schedule_id=row.schedule_id,
        fire_at=row.fire_at,
        state=FireState(row.state),
        job_id=row.job_id,
        job_state=None if row.job_state is None else JobState(row.job_state),
        reason=row.reason,
        missed=row.missed,
        decided_at=row.decided_at,
        settled_at=row.settled_at,
    )
