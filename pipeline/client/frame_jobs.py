"""Where ``client.map`` keeps a frame and its results, so that the same call finds them again; and for how long.

``<map_dir>/<hash of the rows>/`` holds ``input.parquet``, a marker ``used-<Unix seconds>`` of the last call with these
rows, and an output for each set of a job's fields and model.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.client import frames
from pipeline.jobs import deletion, preflight
from pipeline.jobs.control import cancel_job
from pipeline.jobs.status_query import job_status
from pipeline.process.attendance import with_attendance
from pipeline.process.runtime import Runtime
from pipeline.worker import embedded
from pipeline.worker.maintenance import run_step
from storage import locations
from storage.errors import InvalidJob, InvalidSettings
from storage.fleet import job_lookup
from storage.log_actions import Action
from storage.logs import get_logger
from storage.queue import jobs
from storage.records import Job
from storage.states import TERMINAL_JOB, JobState

log = get_logger(__name__)

_OURS = {
    "input": "the rows are the first argument",
    "output": "the results are returned; submit() writes to a place of your own",
    "overwrite": "a call with the same rows and fields returns what is there",
    "idempotency_key": "the rows and fields are the key",
}
_MARKER = re.compile(r"/([0-9a-f]{32})/used-(\d+)$")
_ABANDONED_SECONDS = 86_400.0
_PAGE = 100


@dataclass(frozen=True, slots=True)
class Frame:
    """Rows as they are kept. ``metadata``: of the schema that they came with."""

    folder: str
    uri: str
    metadata: Mapping[Any, Any]


def refuse(runtime: Runtime, fields: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob` for fields that cannot work, before any row is read."""
    for name, why in _OURS.items():
        if name in fields:
            raise InvalidJob(f"map() takes none: {why}", field=name)
    settings = runtime.settings
    if settings.broker_url is not None and settings.map_dir is None:
        raise InvalidSettings("in a fleet map() needs one: a folder or URL that all workers reach", field="map_dir")
    preflight.request_of(runtime, {**fields, "input": "input", "output": "output"})


def keep(runtime: Runtime, data: object) -> Frame:
    """Write the rows of ``data`` to their place, unless they are there. Raises :class:`InvalidInput`."""
    store, root = runtime.store, runtime.settings.effective_map_dir
    reader = frames.reader_of(data)
    fresh = f"{root}/new-{int(time.time())}-{secrets.token_hex(4)}.parquet"
    written = frames.write(store, fresh, reader, once=isinstance(data, pa.RecordBatchReader))
    folder = f"{root}/{written.sha256[:32]}"
    uri = f"{folder}/input.parquet"
    _mark(runtime, folder)
    if not store.exists(uri):
        store.publish(fresh, uri, sha256=written.sha256)
    store.delete([fresh])
    return Frame(folder, uri, dict(reader.schema.metadata or {}))


def fields_of(runtime: Runtime, frame: Frame, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The job's fields with its output folder. The folder belongs to these fields and the model's present files."""
    request = preflight.request_of(runtime, {**fields, "input": frame.uri, "output": frame.folder})
    name = f"{request.spec.work_hash()[:24]}-{request.model.digest[-8:]}"
    return {**fields, "input": frame.uri, "output": f"{frame.folder}/{name}"}


def earlier(runtime: Runtime, output: str) -> Job | None:
    """The job of an earlier call that ended without completing: there is something to go on from."""
    job = jobs.newest_on_output(runtime.database, locations.normalize(output))
    return job if job is not None and job.state in TERMINAL_JOB and job.state is not JobState.COMPLETED else None


def with_index(table: pa.Table, frame: Frame) -> pa.Table:
    """The results of a pandas frame, with what ``to_pandas()`` needs to restore its index."""
    if b"pandas" not in frame.metadata:
        return table
    return table.replace_schema_metadata({**(table.schema.metadata or {}), b"pandas": frame.metadata[b"pandas"]})


def prune(runtime: Runtime) -> None:
    """Delete the frames that no call has used for ``map_retention_days``, their results and their jobs."""
    root, now = runtime.settings.effective_map_dir, time.time()
    cutoff = now - 86_400 * runtime.settings.map_retention_days
    for folder, used in _last_used(runtime).items():
        if used < cutoff:
            run_step(_remove, runtime, folder)
    abandoned = []
    for item in runtime.store.find(f"{root}/new-*.parquet", changing=True):
        began = re.search(r"/new-(\d+)-", item.uri)
        if began is not None and int(began[1]) < now - _ABANDONED_SECONDS:
            abandoned.append(item.uri)
    runtime.store.delete(abandoned)


def _mark(runtime: Runtime, folder: str) -> None:
    mine = f"{folder}/used-{int(time.time())}"
    runtime.store.put_bytes(mine, b"")
    others = [item.uri for item in runtime.store.find(f"{folder}/used-*", changing=True)]
    runtime.store.delete([uri for uri in others if uri.rpartition("/")[2] != mine.rpartition("/")[2]])


def _last_used(runtime: Runtime) -> dict[str, int]:
    found: dict[str, int] = {}
    for item in runtime.store.find(f"{runtime.settings.effective_map_dir}/*/used-*", changing=True):
        if (match := _MARKER.search(item.uri)) is not None:
            folder = item.uri.rpartition("/")[0]
            found[folder] = max(found.get(folder, 0), int(match[2]))
    return found


def _remove(runtime: Runtime, folder: str) -> None:
    while found := job_lookup.listed(runtime.database, output_uri=folder, limit=_PAGE):
        statuses = with_attendance(runtime, found, [job_status(runtime.database, job) for job in found])
        if any(status.attended and not status.terminal for status in statuses):
            return
        for status in statuses:
            if not status.terminal:
                cancel_job(runtime, status.id)
                embedded.cancel_idle(runtime, status.id)
            deletion.delete_job(runtime, status.id)
    runtime.store.delete_tree(folder)
    log.info("the frame at %s was not used any more, and is deleted", folder, action=Action.FRAME_DELETED)
