"""Records as JSON documents: the same on the command line and over HTTP. Times are Unix seconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.client.handle import JobHandle
    from storage.fleet.workers import WorkerStatus
    from storage.records import Attempt, Event, Fire, Schedule


def attempt(item: Attempt) -> dict[str, Any]:
    """Times are Unix seconds; ``seconds`` is how long it took, ``None`` while it runs."""
    ended = item.ended_at
    return {
        "shard": item.shard_id,
        "attempt": item.attempt_no,
        "state": str(item.state),
        "resumed": item.rows_resumed,
        "computed": item.rows_computed,
        "seconds": None if ended is None else round(ended - item.started_at, 3),
        "worker": item.worker_id,
        "error": item.error,
        "started_at": item.started_at,
        "ended_at": ended,
        "stats": dict(item.stats),
    }


def failed_rows(handle: JobHandle, limit: int | None, after: int | None) -> dict[str, Any]:
    """A page of the failed rows of a job: ``more`` says whether others follow, which begin behind row ``after``."""
    rows = handle.errors(limit=None if limit is None else limit + 1, after=after)
    found = list(rows)
    more = limit is not None and len(found) > limit
    document = [{"row": item.row, "code": item.code, "message": item.message} for item in found[:limit]]
    last = document[-1]["row"] if more else None
    return {"job": handle.id, "errors": document, "total": rows.total, "more": more, "after": last}


def event(item: Event) -> dict[str, Any]:
    """One entry of the audit trail; ``at`` is Unix seconds."""
    return {
        "at": item.at,
        "type": item.type,
        "shard": item.shard_id,
        "attempt": item.attempt_no,
        "actor": item.actor,
        "data": dict(item.data),
    }


def schedule(item: Schedule) -> dict[str, Any]:
    document = asdict(item)
    return {**document, "job": document.pop("spec"), "next_at": None if item.paused else item.next_at}


def fire(item: Fire) -> dict[str, Any]:
    return {
        "fire_at": item.fire_at,
        "state": str(item.state),
        "reason": item.reason,
        "missed": item.missed,
        "job": item.job_id,
        "job_state": None if item.job_state is None else str(item.job_state),
        "decided_at": item.decided_at,
        "settled_at": item.settled_at,
    }


def worker(seen: WorkerStatus) -> dict[str, Any]:
    item = seen.worker
    return {
        "id": item.id,
        "state": seen.state,
        "host": item.host,
        "engines": list(item.engines),
        "queues": list(item.queues),
        "slots": item.slots,
        "shards": list(seen.holds),
        "warm": [dict(each) for each in seen.warm],
        "trouble": seen.trouble,
        "version": item.version,
        "started_at": seen.started_at,
        "silent_seconds": round(seen.silent_seconds, 3),
    }
