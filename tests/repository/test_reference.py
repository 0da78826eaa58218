"""The generated pages of the reference are those that the code gives now."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines.fake.faults import FakeOptions
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage import states
from storage.log_actions import Action

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs/generate.py"


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate_docs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_pages_are_up_to_date(generate: Any) -> None:
    for path, text in generate.pages().items():
        assert path.is_file(), f"{path.relative_to(ROOT)} is missing: run 'make docs'"
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is out of date: run 'make docs'"


def test_it_writes_what_is_out_of_date(generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "REFERENCE", tmp_path / "docs" / "reference")
    assert generate.main(["--check"]) == 1
    assert not (tmp_path / "docs").exists()
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    (tmp_path / "docs/reference/states.md").write_text("old")
    assert generate.main(["--check"]) == 1


def test_it_runs_as_make_docs_runs_it() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_move_is_drawn(generate: Any) -> None:
    page = generate.states_page()
    drawings = page.split("```mermaid")[1:]
    tables: tuple[Mapping[Any, frozenset[Any]], ...] = (
        *(states.JOB, states.SHARD, states.ATTEMPT, states.REQUEST, states.FIRE, states.REVISION),
        states.BATCH,
    )
    assert len(drawings) == len(tables)
    for drawing, moves in zip(drawings, tables, strict=True):
        drawn = {
            tuple(line.strip().split(" --> ")) for line in drawing.partition("```")[0].splitlines() if "-->" in line
        }
        expected = {(str(source), str(target)) for source, targets in moves.items() for target in targets}
        assert {pair for pair in drawn if "[*]" not in pair} == expected


def test_every_code_and_option_is_described(generate: Any) -> None:
    assert list(generate.attribute_docs(RowErrorCode)) == [code.name for code in RowErrorCode]
    assert list(generate.attribute_docs(FakeOptions)) == list(FakeOptions.model_fields)


def test_every_action_has_the_levels_of_its_calls(generate: Any) -> None:
    levels = generate.levels_of_actions()
    assert set(levels) == set(Action.__members__)
    assert levels["SHARD_CLAIMED"] == "info"
    assert levels["ATTEMPT_RELEASED"] == "info, warning"
    assert levels["JOB_PUBLISHING_POSTPONED"] == "warning, error"
    assert levels["PROCESS_CRASHED"] == "critical"


def test_the_schema_is_that_of_the_spec(generate: Any) -> None:
    schema = json.loads(generate.job_schema())
    assert set(schema["properties"]) == set(JobSpec.model_fields)
    assert schema["required"] == ["input", "output", "model", "task"]
    assert schema["additionalProperties"] is False
    described = {name for name, field in schema["properties"].items() if "description" in field}
    assert {"input", "output", "model", "prompt", "sampling", "overlong", "keep_columns"} <= described
