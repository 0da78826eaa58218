"""Records as JSON documents: those that only the HTTP API shows in this form."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from storage.fleet.workers import WorkerStatus
from storage.records import Fire, Schedule
from storage.registry.records import Revision


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


def revision(item: Revision) -> dict[str, Any]:
    return {
        "name": item.model.name,
        "tenant": item.model.tenant,
        "revision": item.number,
        "state": str(item.state),
        "digest": item.digest,
        "task": item.task,
        "created_at": item.created_at,
    }
