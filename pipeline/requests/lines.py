"""The lines of OpenAI's batch files: output lines and error lines, from the rows of a job's output. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.requests.faults import UNANSWERED, error_body, status_code
from pipeline.spec.error_codes import MESSAGE_LIMIT


def line_id(job_id: str, custom_id: str) -> str:
    """The id of a request's line: the same each time that the line is written."""
    return "batch_req_" + hashlib.sha256(f"{job_id}/{custom_id}".encode()).hexdigest()[:32]


def output_line(job_id: str, custom_id: str, body: str) -> bytes:
    """The line of a request that was answered. ``body``: the response as JSON text."""
    head = {"id": line_id(job_id, custom_id), "custom_id": custom_id}
    response = {"status_code": 200, "request_id": _request_id(job_id, custom_id)}
    # The body is JSON already, and long: it is inserted without parsing it again.
    text = json.dumps(head, ensure_ascii=False)[:-1]
    inside = json.dumps(response)[:-1]
    return f'{text}, "response": {inside}, "body": {body}}}, "error": null}}\n'.encode()


def error_line(job_id: str, custom_id: str, code: str, message: str) -> bytes:
    """The line of a request that failed, from the row's ``error``; or that got no answer (``batch_cancelled``, …)."""
    document: dict[str, Any] = {"id": line_id(job_id, custom_id), "custom_id": custom_id, "response": None}
    if code not in UNANSWERED:
        document["response"] = {
            "status_code": status_code(code),
            "request_id": _request_id(job_id, custom_id),
            "body": error_body(code, message),
        }
    document["error"] = {"code": code, "message": message[:MESSAGE_LIMIT]}
    return (json.dumps(document, ensure_ascii=False) + "\n").encode()


def line_of(job_id: str, row: Mapping[str, Any], prefix: str = "") -> tuple[bool, bytes]:
    """Whether a row of the output was answered, and its line. ``row``: its columns ``custom_id``, ``response`` (with
    the job's ``output_prefix``) and ``error``."""
    error = row["error"]
    if error is None:
        return True, output_line(job_id, row["custom_id"], row[f"{prefix}response"])
    return False, error_line(job_id, row["custom_id"], error["code"], error["message"])


def _request_id(job_id: str, custom_id: str) -> str:
    return "req_" + hashlib.sha256(f"{job_id}/{custom_id}/request".encode()).hexdigest()[:32]
