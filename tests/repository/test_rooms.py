"""Rooms that a newcomer can look over: few modules in a folder, few lines in a module."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "storage", "tasks")
MOST_MODULES = 15
MOST_LINES = 400
TOO_LONG = {
    "pipeline/engines/vllm/engine.py": 459,
    "pipeline/engines/vllm/process/process.py": 454,
}
"""Modules that were longer when the limit came, and how long each may be. A line leaves when its module is split."""

FOLDERS = sorted({path.parent for top in (*PACKAGES, "tests", "benchmarks") for path in (ROOT / top).rglob("*.py")})
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("folder", FOLDERS, ids=_name)
def test_a_folder_has_few_modules(folder: Path) -> None:
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, f"{_name(folder)}: {modules}"


def test_modules_are_short() -> None:
    lines = {_name(path): len(path.read_text().splitlines()) for path in MODULES}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert long.keys() <= TOO_LONG.keys(), f"split {sorted(long.keys() - TOO_LONG.keys())}"
    assert all(count <= TOO_LONG[name] for name, count in long.items()), long
    assert long.keys() == TOO_LONG.keys(), f"no longer too long: {sorted(TOO_LONG.keys() - long.keys())}"


def test_tests_have_the_rooms_of_what_they_test() -> None:
    """A folder of tests is named like a room, or is a suite that crosses rooms."""
    suites = {"acceptance", "chaos", "conformance", "embedded", "faults", "integration", "repository"}
    rooms = {path.name for package in ("pipeline", "storage") for path in (ROOT / package).iterdir() if path.is_dir()}
    found = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert found <= suites | rooms | {"storage", "tasks"}
