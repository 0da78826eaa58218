"""The page that follows one job through the files names what is there, and few files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "explanation" / "one-job.md").read_text()
MOST_FILES = 12
MOST_LINES_OF_RUN_SHARD = 45

STOPS = dict(re.findall(r"^## \d+\. [^`]+`([^`]+)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def _functions(file: Path) -> dict[str, ast.FunctionDef]:
    """The functions of a module, and the methods of its classes as ``Class.method``."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_stop_is_a_file_with_the_functions_that_are_named() -> None:
    assert STOPS
    for name, text in STOPS.items():
        assert (ROOT / name).is_file(), name
        named = set(re.findall(r"`([\w.]+)\(\)`", text))
        assert named, f"{name}: no function is named"
        assert not named - _functions(ROOT / name).keys(), f"{name}: {sorted(named - _functions(ROOT / name).keys())}"


def test_the_path_is_short() -> None:
    assert len(STOPS) == len(re.findall(r"^## ", PAGE, re.MULTILINE)) <= MOST_FILES


def test_the_loop_can_be_read_in_one_go() -> None:
    loop = _functions(ROOT / "pipeline/execution/run_shard.py")["run_shard"]
    assert (loop.end_lineno or 0) - loop.lineno + 1 <= MOST_LINES_OF_RUN_SHARD
    nested = [node for node in ast.walk(loop) if node is not loop and isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert not nested, "run_shard has a closure"
