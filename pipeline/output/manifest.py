"""``_manifest.json``: what is needed to trust a run, or to repeat it. Pure: plain values in, JSON-able values out."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pyroaring import BitMap

from storage.records import Job, Source
from storage.states import JobState

MANIFEST_VERSION = 2
"""Raised when a field changes its meaning or goes; new fields may come without. 2: ``missing`` may be ``None``."""
MOST_RANGES = 1000
"""Ranges of missing rows in a list. A cancelled job whose rows were regrouped may miss every second row: then a file's
entry has a bitmap of them, 11 kB or less for 65,536 rows, and the list of the whole is ``None``."""


def path(uri: str) -> str:
    """A published file's place below the output."""
    return "/".join(uri.split("/")[-2:])


def part(
    uri: str,
    *,
    n_bytes: int,
    sha256: str,
    row_start: int,
    rows: int,
    failed: int,
    missing: Iterable[tuple[int, int]],
) -> dict[str, Any]:
    """One published file: ``rows`` rows, those of the job from ``row_start`` on, without the ranges in ``missing``.

    ``missing`` are half-open ranges of the job's rows, in order. Of more than ``MOST_RANGES`` the entry has ``None``,
    and in ``missing_rows`` the rows, counted from ``row_start``: a Roaring bitmap in its portable format, in base64.
    """
    gaps = [[low, high] for low, high in missing]
    entry = {
        "path": path(uri),
        "bytes": n_bytes,
        "sha256": sha256,
        "row_start": row_start,
        "rows": rows,
        "rows_failed": failed,
        "missing": gaps,
    }
    if len(gaps) > MOST_RANGES:
        held = BitMap()
        for low, high in gaps:
            held.add_range(low - row_start, high - row_start)
        held.run_optimize()
        entry |= {"missing": None, "missing_rows": base64.b64encode(held.serialize()).decode()}
    return entry


def missing_rows(entry: Mapping[str, Any]) -> BitMap:
    """The rows that the file of an entry (:func:`part`) leaves out, counted from its ``row_start``."""
    if entry["missing"] is None:
        return BitMap.deserialize(base64.b64decode(entry["missing_rows"]))
    held = BitMap()
    for low, high in entry["missing"]:
        held.add_range(low - entry["row_start"], high - entry["row_start"])
    return held


def build(
    *,
    job: Job,
    parts: Sequence[Mapping[str, Any]],
    sources: Sequence[Source],
    attempts: Iterable[Mapping[str, Any]],
    published_at: float,
    versions: Mapping[str, str] | None = None,
    measured: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The manifest of a published job. ``parts`` are made by :func:`part`, in row order.

    ``attempts`` are the engines' statements about themselves, ``published_at`` Unix seconds, ``versions`` those of the
    libraries that published, ``measured`` the sums of what all attempts measured. Row ranges are half-open and count
    from the start of the input.
    """
    missing = _missing(parts, job.rows_total)
    rows = sum(entry["rows"] for entry in parts)
    failed = sum(entry["rows_failed"] for entry in parts)
    return {
        "manifest_version": MANIFEST_VERSION,
        "job": {
            "id": job.id,
            "tenant": job.tenant,
            "state": str(job.state),
            "generation": job.gen,
            "stop_reason": job.stop_reason,
            "error": job.error,
        },
        "partial": rows < job.rows_total or job.state is not JobState.COMPLETED,
        "rows": {
            "total": job.rows_total,
            "published": rows,
            "succeeded": rows - failed,
            "failed": failed,
            "missing": job.rows_total - rows,
        },
        "missing": None if missing is None else [[low, high] for low, high in missing],
        "tokens": dict(job.tokens),
        "measured": dict(measured or {}),
        "spec": dict(job.spec),
        "spec_hash": job.spec_hash,
        "model": {
            "name": job.spec.get("model"),
            "digest": job.plan.get("model_digest"),
            "architectures": list(job.plan.get("architectures", ())),
            **({} if job.model is None else _registered(job.model)),
            **({"adapters": dict(job.plan["adapters"])} if job.plan.get("adapters") else {}),
        },
        "engine": {"name": job.engine, "key": job.engine_key, "facts": _distinct(attempts)},
        "versions": dict(versions or {}),
        "inputs": [
            {
                "uri": source.uri,
                "etag": source.etag,
                "bytes": source.n_bytes,
                "rows": source.n_rows,
                "partition": dict(source.partition),
            }
            for source in sources
        ],
        "timings": {
            "created_at": job.created_at,
            "started_at": job.started_at,
            "published_at": published_at,
            "seconds": None if job.started_at is None else round(published_at - job.started_at, 3),
        },
        "parts": [dict(entry) for entry in parts],
    }


def _registered(model: Mapping[str, Any]) -> dict[str, Any]:
    return {"registered": model["name"], "revision": model["revision"], "reports": list(model["reports"])}


def _missing(parts: Sequence[Mapping[str, Any]], total: int) -> list[tuple[int, int]] | None:
    """Half-open ranges of the job's rows that no part holds, in order and merged; ``None``: too many for a list."""
    merged: list[tuple[int, int]] = []
    for low, high in _gaps(parts, total):
        if low >= high:
            continue
        if merged and merged[-1][1] == low:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
        if len(merged) > MOST_RANGES:
            return None
    return merged


def _gaps(parts: Sequence[Mapping[str, Any]], total: int) -> Iterator[tuple[int, int]]:
    at = 0
    for entry in sorted(parts, key=lambda item: int(item["row_start"])):
        yield at, entry["row_start"]
        if entry["missing"] is not None:
            yield from ((low, high) for low, high in entry["missing"])
        else:
            yield from ((entry["row_start"] + row, entry["row_start"] + row + 1) for row in missing_rows(entry))
        at = entry["row_start"] + entry["rows"] + len(missing_rows(entry))
    yield at, total


def _distinct(statements: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The statements that differ in more than numbers; of those that do not, what they agree on (so no counters)."""
    found: dict[str, dict[str, Any]] = {}
    for statement in statements:
        key = json.dumps(_without_numbers(statement), sort_keys=True, default=str)
        if key in found:
            found[key] = {k: v for k, v in found[key].items() if k in statement and statement[k] == v}
        else:
            found[key] = dict(statement)
    return [facts for facts in found.values() if facts]


def _without_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: v for k, v in ((k, _without_numbers(v)) for k, v in value.items()) if v is not None}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return None
    return value
