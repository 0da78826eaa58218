"""Files, batches and models as the objects of OpenAI's API. Times are whole Unix seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.jobs.status_query import job_status
from storage.errors import NotFound
from storage.files.records import Batch, File
from storage.queue import jobs
from storage.sql.database import Database

_TIMES = (
    *("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
    *("cancelling_at", "cancelled_at"),
)


def file(found: File) -> dict[str, Any]:
    return {
        "id": found.id,
        "object": "file",
        "bytes": found.n_bytes,
        "created_at": int(found.created_at),
        "expires_at": _seconds(found.expires_at),
        "filename": found.filename,
        "purpose": str(found.purpose),
        "status": "processed",
        "status_details": None,
    }


def batch(database: Database, found: Batch) -> dict[str, Any]:
    """The batch; while it runs, with the counts of its job."""
    counts, tokens = _counts(database, found)
    return {
        "id": found.id,
        "object": "batch",
        "endpoint": found.endpoint,
        "model": found.model,
        "errors": found.errors,
        "input_file_id": found.input_file_id,
        "completion_window": found.completion_window,
        "status": str(found.state),
        "output_file_id": found.output_file_id,
        "error_file_id": found.error_file_id,
        **{name: _seconds(getattr(found, name)) for name in _TIMES},
        "request_counts": counts,
        "metadata": found.metadata,
        "usage": {
            "input_tokens": tokens[0],
            "input_tokens_details": {"cached_tokens": tokens[1]},
            "output_tokens": tokens[2],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens[0] + tokens[2],
        },
    }


def page(items: Sequence[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """One page of a list."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": more,
    }


def model(name: str, created_at: float, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created_at), "owned_by": owner}


def _counts(database: Database, found: Batch) -> tuple[dict[str, int], tuple[int, int, int]]:
    total, completed, failed = found.n_total, found.n_completed, found.n_failed
    tokens = (found.input_tokens, found.cached_tokens, found.output_tokens)
    if not found.terminal and found.job_id is not None:
        try:
            status = job_status(database, jobs.get(database, found.job_id))
        except NotFound:  # deleted by an operator
            pass
        else:
            completed, failed = status.rows_done - status.rows_failed, status.rows_failed
            counted = status.tokens
            tokens = (counted["prompt_tokens"], counted["cached_tokens"], counted["completion_tokens"])
    return {"total": total, "completed": completed, "failed": failed}, tokens


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
