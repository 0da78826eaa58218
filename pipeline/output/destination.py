"""What lies at a job's output location: is it free, and where does a committed file stand now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.spec import json_text
from storage import locations
from storage.errors import Conflict
from storage.objects.store import ObjectStore
from storage.queue.publish_leases import FinishedShard
from storage.records import Job, PartFile


def refuse_existing(store: ObjectStore, output: str) -> None:
    """Raise :class:`Conflict` when ``output`` holds published rows, whoever published them."""
    if not is_free(store, output):
        raise Conflict(
            f"{output} already holds published rows{_of_a_partial_job(store, output)}; choose another output, or pass "
            "--overwrite (overwrite=True) to replace them when the new job ends",
            field="output",
        )


def _of_a_partial_job(store: ObjectStore, output: str) -> str:
    """Say whose they are when that job can still be finished: to overwrite them would compute them again."""
    if not store.exists(locations.manifest(output)):
        return ""
    try:
        manifest = json_text.loads(store.read_bytes(locations.manifest(output)))
        job, partial = str(manifest["job"]["id"]), bool(manifest["partial"])
    except (ValueError, KeyError, TypeError):
        return ""
    return f" of job {job}, which did not complete: 'rowmill job retry {job}' goes on from there" if partial else ""


def manifest_job(store: ObjectStore, output: str) -> str | None:
    """The job whose manifest is there; ``None`` without one, ``""`` for one that does not say."""
    if not store.exists(locations.manifest(output)):
        return None
    try:
        return str(json_text.loads(store.read_bytes(locations.manifest(output)))["job"]["id"])
    except (ValueError, KeyError, TypeError):
        return ""


def is_free(store: ObjectStore, output: str) -> bool:
    """Whether nobody has published anything at ``output``."""
    marks = (locations.success(output), locations.manifest(output))
    return not any(store.exists(mark) for mark in marks) and not store.find(f"{locations.data_dir(output)}/*.parquet")


def published(store: ObjectStore, output: str, idx: int, file: PartFile | None) -> PartFile | None:
    """The same committed file at the place where it can be read now: once published, its attempt's copy may be gone."""
    if file is None or store.exists(file.uri):
        return file
    return replace(file, uri=locations.part(output, idx))


def earlier_parts(store: ObjectStore, job: Job) -> dict[str, dict[str, Any]]:
    """The manifest's entries of what this very job had published before, by path; none for its first time.

    To be read before the manifest goes: a copy is kept for a finalizer that has to begin again.
    """
    manifest, copy = locations.manifest(job.output_uri), locations.earlier_manifest(job.output_uri, job.id)
    for uri in (manifest, copy):
        if not store.exists(uri):
            continue
        content = store.read_bytes(uri)
        try:
            document = json_text.loads(content)
            found = {str(entry["path"]): dict(entry) for entry in document["parts"]}
            if document["job"]["id"] != job.id:
                continue
        except (ValueError, KeyError, TypeError):
            continue
        if uri == manifest:
            store.put_bytes(copy, content)
        return found
    return {}


def outputs_gone(store: ObjectStore, job: Job, closed_shards: Iterable[FinishedShard]) -> list[str]:
    """Ids of the shards whose committed files have been deleted. One listing."""
    there: set[str] | None = None
    gone = []
    for closed in closed_shards:
        if closed.output is not None:
            if there is None:
                there = set(store.list_tree(locations.attempts_dir(job.output_uri, job.id)))
            if closed.output.uri not in there:
                gone.append(closed.shard.id)
    return gone


def chunks_are_gone(store: ObjectStore, chunks: Sequence[str]) -> bool:
    """Whether any of the chunks that a regrouped job was made of has been deleted. One listing."""
    if not chunks:
        return False
    there = set(store.list_tree(chunks[0].rpartition("/")[0]))
    return any(uri not in there for uri in chunks)
