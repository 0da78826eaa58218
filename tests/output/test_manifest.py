"""What the manifest says of whole and of partial outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pipeline.output import manifest
from storage.records import Job, Source
from storage.states import JobState

JOB = Job(
    id="0199",
    tenant="default",
    state=JobState.COMPLETED,
    priority=0,
    queue="vllm",
    engine="vllm",
    engine_key="vllm:abc",
    spec={"model": "m", "task": "generate", "sampling": {"seed": 7}},
    spec_hash="h",
    idempotency_key=None,
    plan={"model_digest": "d1", "architectures": ["LlamaForCausalLM"], "schema": "…"},
    output_uri="s3://out",
    stop_reason=None,
    error=None,
    gen=0,
    n_shards=3,
    n_open=0,
    n_failed_shards=0,
    rows_total=250,
    rows_done=250,
    rows_failed=2,
    tokens={"prompt_tokens": 10},
    finalize_epoch=1,
    publishing=True,
    created_at=100.0,
    started_at=110.0,
    ended_at=None,
    expires_at=None,
    cancel_requested_at=None,
    max_failed_rows=None,
    needs_republish=False,
)
SOURCES = [Source(0, "s3://in/a", "e1", 5, 250, {"year": "2024"})]


def part(idx: int, start: int, rows: int, failed: int = 0, missing: Any = ()) -> dict[str, Any]:
    uri = f"s3://out/data/part-{idx:05d}.parquet"
    return manifest.part(uri, n_bytes=9, sha256="x", row_start=start, rows=rows, failed=failed, missing=missing)


def build(parts: list[dict[str, Any]], job: Job = JOB, attempts: Any = ()) -> dict[str, Any]:
    document = manifest.build(
        job=job, parts=parts, sources=SOURCES, attempts=attempts, published_at=150.0, versions={"rowmill": "0.1.0"}
    )
    assert json.loads(json.dumps(document)) == document
    return document


def test_a_whole_output() -> None:
    document = build([part(0, 0, 100), part(1, 100, 100, 2), part(2, 200, 50)])
    assert document["manifest_version"] == 2
    assert document["partial"] is False and document["missing"] == []
    assert document["rows"] == {"total": 250, "published": 250, "succeeded": 248, "failed": 2, "missing": 0}
    assert document["parts"][1] == {
        "path": "data/part-00001.parquet",
        "bytes": 9,
        "sha256": "x",
        "row_start": 100,
        "rows": 100,
        "rows_failed": 2,
        "missing": [],
    }
    assert document["model"] == {"name": "m", "digest": "d1", "architectures": ["LlamaForCausalLM"]}
    assert document["inputs"][0]["etag"] == "e1" and document["inputs"][0]["partition"] == {"year": "2024"}
    assert document["spec"]["sampling"] == {"seed": 7}
    assert document["timings"]["seconds"] == 40.0
    assert document["versions"] == {"rowmill": "0.1.0"}


@pytest.mark.parametrize(
    ("parts", "missing", "published"),
    [
        ([], [[0, 250]], 0),
        ([part(1, 100, 100)], [[0, 100], [200, 250]], 100),
        ([part(0, 0, 60, missing=[(20, 40), (80, 100)])], [[20, 40], [80, 250]], 60),
        (
            [part(2, 200, 50), part(0, 0, 90, missing=[(90, 100)]), part(1, 100, 95, missing=[(100, 105)])],
            [[90, 105]],
            235,
        ),
    ],
)
def test_a_partial_output_says_what_is_missing(parts: Any, missing: Any, published: int) -> None:
    document = build(parts, replace(JOB, state=JobState.CANCELLED, stop_reason="cancelled"))
    assert document["partial"] is True
    assert document["missing"] == missing
    assert document["rows"]["published"] == published
    assert document["rows"]["missing"] == 250 - published == sum(high - low for low, high in missing)
    assert document["job"]["stop_reason"] == "cancelled"


@pytest.mark.parametrize("extra", [0, 1])
def test_more_gaps_than_a_list_should_have_are_a_bitmap(extra: int) -> None:
    gaps = [(10 + 4 * n, 12 + 4 * n) for n in range(manifest.MOST_RANGES + extra)]
    rows = 10_000 - 2 * len(gaps)
    entries = [part(0, 0, 10), part(1, 10, rows, missing=gaps)]
    document = build(entries, replace(JOB, state=JobState.CANCELLED, rows_total=10_010))
    absent = [row for low, high in gaps for row in range(low, high)]
    assert [10 + row for row in manifest.missing_rows(entries[1])] == absent
    assert document["rows"]["missing"] == len(absent)
    assert document["partial"] is True
    if not extra:
        assert document["missing"] == entries[1]["missing"] == [list(gap) for gap in gaps]
    else:
        assert document["missing"] is entries[1]["missing"] is None
        assert len(entries[1]["missing_rows"]) < 11_000  # a container of 65,536 rows has 8 KiB at most


def test_many_files_with_few_gaps_each() -> None:
    entries = [part(n, 10 * n, 8, missing=[(10 * n, 10 * n + 1), (10 * n + 5, 10 * n + 6)]) for n in range(600)]
    document = build(entries, replace(JOB, state=JobState.CANCELLED, rows_total=6000))
    assert document["missing"] is None and document["rows"]["missing"] == 1200
    assert all(entry["missing"] for entry in document["parts"])


def test_a_job_without_rows() -> None:
    document = build([], replace(JOB, rows_total=0, started_at=None))
    assert document["partial"] is False and document["missing"] == []
    assert document["timings"]["seconds"] is None


def test_engines_speak_once_and_without_their_counters() -> None:
    one = {"engine": "vllm", "versions": {"vllm": "1"}, "settings": {"max_num_seqs": 8}, "tokens": {"prompt": 5}}
    other = {**one, "tokens": {"prompt": 9}}
    newer = {**one, "versions": {"vllm": "2"}}
    document = build([], attempts=[one, other, newer, {}])
    assert document["engine"]["facts"] == [
        {"engine": "vllm", "versions": {"vllm": "1"}, "settings": {"max_num_seqs": 8}},
        newer,
    ]
