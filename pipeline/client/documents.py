"""A job's attempts and events as JSON documents: the same on the command line and over HTTP."""

from __future__ import annotations

from typing import Any

from storage.records import Attempt, Event


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
