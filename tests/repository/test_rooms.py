"""Rooms that a newcomer can look over: few modules in a folder, few lines in a module."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "storage", "tasks")
MOST_MODULES = 15
MOST_LINES = 400

FOLDERS = sorted({path.parent for top in (*PACKAGES, "tests", "benchmarks") for path in (ROOT / top).rglob("*.py")})
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
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
    assert not long, f"split {long}"


@pytest.mark.parametrize("package", ["storage", "pipeline"])
def test_the_page_on_architecture_has_every_folder_in_the_order_of_imports(package: str) -> None:
    page = (ROOT / "docs/explanation/architecture.md").read_text()
    table = page.partition(f"| Folder of `{package}/` |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)/` \|", table, re.MULTILINE)
    assert sorted(named) == sorted(path.parent.name for path in (ROOT / package).glob("*/__init__.py"))
    (layers,) = (contract["layers"] for contract in CONTRACTS if contract.get("containers") == [package])
    level = {name.strip(): -at for at, layer in enumerate(layers) for name in layer.split("|")}
    assert [level[name] for name in named] == sorted(level[name] for name in named)


def test_tests_have_the_rooms_of_what_they_test() -> None:
    """A folder of tests is named like a room, or is a suite that crosses rooms."""
    suites = {"acceptance", "chaos", "packaged", "conformance", "embedded", "faults", "integration", "repository"}
    rooms = {path.name for package in ("pipeline", "storage") for path in (ROOT / package).iterdir() if path.is_dir()}
    found = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert found <= suites | rooms | {"storage", "tasks"}
