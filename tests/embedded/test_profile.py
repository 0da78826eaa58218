from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.tiny_encoder import build_encoder
from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.execution.profiling import summary, together
from storage.errors import InvalidJob


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    build_encoder(tmp_path / "encoder")
    pq.write_table(pa.table({"text": [f"red dog {n}" for n in range(80)]}), tmp_path / "in.parquet")
    return {
        "input": str(tmp_path / "in.parquet"),
        "output": str(tmp_path / "out"),
        "model": str(tmp_path / "encoder"),
        "task": "embed",
        "column": "text",
        "profile": True,
    }


@pytest.mark.parametrize("sessions", [1, 2])
def test_a_profiled_job_leaves_traces_and_shares_of_time(
    settings: Settings, tmp_path: Path, fields: dict[str, Any], sessions: int
) -> None:
    with Client(settings=settings) as client:
        status = client.run(**fields, shard_rows=40, engine_options={"sessions": sessions, "max_batch": 8})
        attempts = client.job(status.id).attempts()
    assert status.state == "completed" and status.rows_done == 80 and len(attempts) == 2
    traces = sorted((tmp_path / "out" / "_profile").iterdir())
    assert [trace.name for trace in traces] == ["shard-00000-1.json", "shard-00001-1.json"]
    for attempt, trace in zip(sorted(attempts, key=lambda a: a.stats["profile"]["trace"]), traces, strict=True):
        profile = attempt.stats["profile"]
        assert profile["trace"] == str(trace)
        events = json.loads(trace.read_text())
        kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        assert sum(each["runs"] for each in profile["operators"]) == len(kernels) > 0
        assert {e["args"]["provider"] for e in kernels} == {"CPUExecutionProvider"}
        assert sum(each["share"] for each in profile["operators"]) == pytest.approx(1, abs=0.01)
        assert attempt.stats["engine"]["rows"] == 40
    assert pq.read_table(tmp_path / "out" / "data").num_rows == 80


def test_an_engine_without_traces_is_refused(settings: Settings, tmp_path: Path, fields: dict[str, Any]) -> None:
    fields |= {"model": "fake"}
    with (
        Client(settings=settings) as client,
        pytest.raises(InvalidJob, match=r"profile: engine 'fake' writes no traces"),
    ):
        client.run(**fields)
    assert not (tmp_path / "out").exists()


def test_summaries_count_kernels_and_add_up() -> None:
    def event(operator: str, microseconds: int, name: str = "x_kernel_time", cat: str = "Node") -> dict[str, Any]:
        return {"cat": cat, "name": name, "dur": microseconds, "args": {"op_name": operator, "provider": "CPU"}}

    events = [event("MatMul", 6), event("MatMul", 3), event("Add", 1), event("Add", 9, "fence"), event("Z", 9, cat="S")]
    found = summary(events)
    assert [(e["operator"], e["runs"], e["share"]) for e in found["operators"]] == [("MatMul", 2, 0.9), ("Add", 1, 0.1)]
    both = together([found, found])
    assert both["seconds"] == pytest.approx(2 * found["seconds"])
    assert [e["runs"] for e in both["operators"]] == [4, 2]
    assert summary([]) == {"seconds": 0.0, "operators": []}
