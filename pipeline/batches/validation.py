"""What a batch's file is checked for before a row of it is computed, and the job that then computes it."""

from __future__ import annotations

import math
from typing import Any

from pipeline.batches import places
from pipeline.jobs.submit import submit_job
from pipeline.process.runtime import Runtime
from pipeline.registry import names
from pipeline.requests import envelope
from pipeline.requests.envelope import Fault, FaultCode, Report
from pipeline.spec.request_fields import CUSTOM_ID, TASK_OF
from storage.errors import CorruptFile, InvalidInput, InvalidJob
from storage.files import files
from storage.files.records import Batch, File, Purpose
from storage.queue import jobs
from storage.records import Job

FAKE = "fake"
"""The model that every tenant has."""
_BODY = "body"


def is_known(runtime: Runtime, tenant: str, name: str) -> bool:
    """Whether a tenant's batch may name this model: a registered one, or ``fake``. Never a path."""
    return name == FAKE or (names.parse(name) is not None and runtime.models.is_registered(name, tenant))


def input_file(runtime: Runtime, batch: Batch) -> File | None:
    """The file that the batch reads, where it is there, is the tenant's, and is for batches."""
    found = files.content(runtime.database, batch.tenant, batch.input_file_id)
    return found if found is not None and found.purpose == Purpose.BATCH else None


def check(runtime: Runtime, batch: Batch) -> Report:
    """Read the batch's file to its end. What cannot be run is in the report's faults."""
    settings = runtime.settings
    report = Report(endpoint=batch.endpoint)
    found = input_file(runtime, batch)
    if found is None:
        message = f"there is no file {batch.input_file_id} with the purpose 'batch'"
        report.add(Fault(FaultCode.INVALID_REQUEST, message, param="file_id"))
        return report
    try:
        with runtime.store.open(found.uri) as stream:
            return envelope.scan(
                envelope.physical_lines(stream, settings.max_line_bytes),
                endpoint=batch.endpoint,
                most_lines=settings.max_batch_requests,
                line_bytes=settings.max_line_bytes,
                known_model=lambda name: is_known(runtime, batch.tenant, name),
            )
    except (InvalidInput, CorruptFile) as error:
        report.add(Fault(FaultCode.INVALID_REQUEST, f"the file cannot be read: {error}", param="file_id"))
        return report


def errors_of(report: Report) -> dict[str, Any]:
    """``errors`` of a batch that failed: each fault with its line, and how many more there are."""
    data = [_error(fault) for fault in report.faults]
    if (more := report.n_faults - len(report.faults)) > 0:
        data.append(_error(Fault(FaultCode.INVALID_REQUEST, f"and {more:,} more errors")))
    return {"object": "list", "data": data}


def refusal(error: InvalidJob) -> dict[str, Any]:
    """``errors`` of a batch whose job was refused."""
    return errors_of(_single(Fault(FaultCode.INVALID_REQUEST, error.message, param=_param(error.field))))


def refusal_of_job(job: Job) -> dict[str, Any]:
    """``errors`` of a batch whose job was found unusable when it was planned."""
    return errors_of(_single(Fault(FaultCode.INVALID_REQUEST, job.error or "the batch cannot be run")))


def job_of(runtime: Runtime, batch: Batch) -> Job | None:
    """The batch's job; ``None`` before it is submitted. Found, too, where a process died right after submitting it."""
    with runtime.database.read() as connection:
        return jobs.by_idempotency_key(connection, batch.tenant, batch.id)


def submit(runtime: Runtime, batch: Batch, model: str, seconds: float) -> Job:
    """Submit the batch's job, which has ``seconds`` to complete; the one that is there already, after a crash.

    Raises :class:`InvalidJob` and its kin.
    """
    found = job_of(runtime, batch)
    if found is not None:
        return found
    file = input_file(runtime, batch)
    assert file is not None
    return submit_job(runtime, _fields(runtime, batch, file, model, seconds), plan=runtime.settings.broker_url is None)


def _fields(runtime: Runtime, batch: Batch, file: File, model: str, seconds: float) -> dict[str, Any]:
    return {
        "input": file.uri,
        "output": places.batch_output(runtime.settings, batch.id),
        "model": model,
        "task": TASK_OF[batch.endpoint],
        "request_column": _BODY,
        "endpoint": batch.endpoint,
        "keep_columns": [CUSTOM_ID],
        "tenant": batch.tenant,
        "completion_window": f"{max(1, math.ceil(seconds))}s",
        "idempotency_key": batch.id,
        "metadata": {"batch": batch.id},
    }


def _single(fault: Fault) -> Report:
    report = Report()
    report.add(fault)
    return report


def _error(fault: Fault) -> dict[str, Any]:
    return {"code": str(fault.code), "message": fault.message, "line": fault.line, "param": fault.param}


_PARAMS = {"input": "file_id", "completion_window": "completion_window", "model": "model", "engine": "model"}


def _param(field: str | None) -> str | None:
    """The part of the batch that a field of its job comes from."""
    return _PARAMS.get(field or "")
