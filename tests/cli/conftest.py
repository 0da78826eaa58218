"""The command line as a user has it: a process of its own, in a directory of its own, with its own configuration."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.spec.status import JobStatus
from storage.states import JobState

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


@dataclass(frozen=True)
class Rowmill:
    """``rowmill`` in a directory of its own.

    Calling it starts a process; ``inside`` is quicker, in this one. ``command`` and ``environment`` start it otherwise.
    """

    home: Path
    environment: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pipeline.cli.main", *arguments]

    def __call__(self, *arguments: str, **environment: str) -> Done:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.home,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def inside(self, *arguments: str) -> Done:
        with contextlib.chdir(self.home):
            result = CliRunner().invoke(app, list(arguments), env=self.environment, prog_name="rowmill")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Done(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def rowmill(tmp_path: Path, sqlite_template: Path) -> Rowmill:
    home, data = tmp_path / "home", tmp_path / "data"
    home.mkdir()
    data.mkdir()
    shutil.copy(sqlite_template, data / "rowmill.db")  # migrating is tested once
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROWMILL_")}
    environment |= {
        "PYTHONPATH": str(REPOSITORY),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "ROWMILL_DATA_DIR": str(data),
        "ROWMILL_CACHE_DIR": str(tmp_path / "cache"),
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    return Rowmill(home, environment)


@pytest.fixture
def status() -> Callable[..., JobStatus]:
    """Make a ``JobStatus``; what is not said is of a job that runs."""

    def make(**fields: Any) -> JobStatus:
        plain: dict[str, Any] = {
            "id": "0192aaaa-0000-7000-8000-000000000000",
            "state": JobState.IN_PROGRESS,
            "tenant": "default",
            "task": "generate",
            "model": "fake",
            "engine": "fake",
            "output": "/data/out",
            "input": ("/data/in.parquet",),
            "created_at": 1_700_000_000.0,
        }
        return JobStatus(**plain | fields)

    return make
