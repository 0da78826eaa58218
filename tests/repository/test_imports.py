"""What importing loads: pure modules load nothing heavy, and engine modules import without their extras."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.cli.command_list import COMMANDS, LazyCommands
from pipeline.engines import base
from storage.sql.database import Database

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"sqlalchemy", "alembic", "celery", "kombu", "redis", "vllm", "torch", "transformers", "tokenizers"}
HEAVY |= {"onnxruntime", "onnx", "fsspec", "s3fs", "typer", "rich", "pytest"}


def modules_of(room: str) -> list[str]:
    """The modules in a folder of ``pipeline`` and below, by their dotted names."""
    paths = (path.relative_to(ROOT) for path in (ROOT / "pipeline" / room).rglob("*.py") if path.stem != "__init__")
    return [".".join(path.with_suffix("").parts) for path in paths]


CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
PURE = next(contract["source_modules"] for contract in CONTRACTS if contract["name"].startswith("pure modules"))
# Arrow's types are what this one is about.
SPEC = sorted(set(modules_of("spec")) - {"pipeline.spec.result_columns"})
# Run as a program by the engine that starts it; and a suite for pytest.
NO_MODULES = {"pipeline.engines.vllm.process.child", "pipeline.engines.testing"}
ENGINES = sorted(set(modules_of("engines")) - NO_MODULES)


def loaded_by(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` of a fresh process after the statement."""
    code = (
        f"import sys, json\n{statement}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def calling(*argv: str) -> str:
    """The statements that call the command line and see that it succeeds."""
    return f"""
from pipeline.cli.main import main
sys.argv = {list(argv)!r}
try:
    main()
except SystemExit as end:
    assert not end.code
"""


def test_pure_modules_load_nothing_heavy() -> None:
    assert {"pipeline.spec", "pipeline.models.tasks", "storage.states", "storage.errors"} <= set(PURE)
    assert not loaded_by("import " + ", ".join([*PURE, *SPEC])) & (HEAVY | {"pyarrow"})


def test_the_package_itself_loads_nothing() -> None:
    assert not loaded_by("import pipeline; dir(pipeline)") & (HEAVY | {"pyarrow", "numpy", "pydantic", "storage"})


def test_the_spec_loads_no_engine_and_no_database() -> None:
    assert not loaded_by("from pipeline import JobSpec, RowmillError") & HEAVY


def test_engine_modules_load_no_engine() -> None:
    """Each of them, without anything that an extra brings."""
    assert not loaded_by("import " + ", ".join(ENGINES)) & HEAVY


@pytest.mark.parametrize("hidden", ["vllm", "onnxruntime", "torch", "transformers", "tokenizers", "onnx"])
def test_engine_modules_import_without_the_extras(hidden: str) -> None:
    loaded_by(f"sys.modules[{hidden!r}] = None\nimport " + ", ".join(ENGINES))


def test_the_client_loads_no_engine() -> None:
    assert not loaded_by("from pipeline import Client") & {"vllm", "torch", "transformers", "onnxruntime", "tokenizers"}


def test_the_contract_suite_is_for_tests_only() -> None:
    """It imports pytest, which no process of a deployment needs."""
    core = "import pipeline.cli.main, pipeline.worker.worker, pipeline.worker.embedded, pipeline.client, tasks.app"
    assert "pytest" not in loaded_by(core)


def test_everything_that_an_engine_needs_is_in_one_module() -> None:
    """What the protocols, their values and their errors are made of: a name that is missing breaks a plug-in."""
    assert sorted(base.__all__) == base.__all__
    defined = {name for name, value in vars(base).items() if getattr(value, "__module__", None) == base.__name__}
    assert {name for name in defined if not name.startswith("_")} <= set(base.__all__)
    promised = {"JobSpec", "Task", "Model", "RowErrorCode", "RowError", "InvalidJob", "InvalidInput", "InvalidModel"}
    promised |= {"EngineMissing", "EngineDead", "TransientError", "Blame", "Template", "fields_of"}
    assert promised <= set(base.__all__)


def test_the_help_loads_no_command() -> None:
    """``rowmill --help`` and ``--version`` answer at once: what a command needs is loaded when it is called."""
    for argument in ("--help", "--version"):
        loaded = loaded_by(calling("rowmill", argument))
        assert not loaded & ((HEAVY - {"typer", "rich"}) | {"pyarrow", "numpy", "pandas", "pydantic", "asyncio"})


def test_summaries_of_commands_are_their_own() -> None:
    """The help repeats them so that it need not import the commands."""
    for name, command in LazyCommands().items():
        assert command.name == name
        assert command.help.partition("\n\n")[0].replace("\n", " ") == COMMANDS[name].summary


def test_a_run_on_a_known_database_loads_no_alembic_and_no_pandas(tmp_path: Path) -> None:
    """The two that cost most of a short job's start, and of which nothing is needed."""
    Database(f"sqlite:///{tmp_path / 'rowmill.db'}").upgrade()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
    files = (str(tmp_path / "in.parquet"), "-o", str(tmp_path / "out"), "--data-dir", str(tmp_path))
    call = calling("rowmill", "run", *files, "-m", "fake", "-t", "generate", "-p", "{text}", "--quiet")
    assert not loaded_by(call) & {"alembic", "pandas"}
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_public_names_are_there() -> None:
    assert sorted(pipeline.__all__) == sorted(pipeline._HOMES)
    assert dir(pipeline) == pipeline.__all__
    for name in pipeline.__all__:
        home = importlib.import_module(pipeline._HOMES[name])
        assert getattr(pipeline, name) is getattr(home, name)
        assert getattr(pipeline, name).__module__ == pipeline._HOMES[name]
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        pipeline.nope  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "pipeline/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == pipeline._HOMES


@pytest.mark.parametrize("package", ["pipeline", "storage", "tasks", "migrations"])
def test_package_files_are_empty(package: str) -> None:
    promised = {ROOT / "pipeline/__init__.py", ROOT / "pipeline/engines/fake/__init__.py"}
    for path in (ROOT / package).rglob("__init__.py"):
        if path not in promised:
            assert path.read_text() == "", f"{path.relative_to(ROOT)} is not empty"
