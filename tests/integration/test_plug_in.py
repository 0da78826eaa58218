"""The page *Write an engine*, executed as it stands: another distribution, built, installed and run by its users."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from storage.errors import InvalidJob
from storage.states import JobState

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/how-to/write-an-engine.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)

# A second engine of the same distribution: every row's result is the options that reached it. Their names are those of
# options of vLLM that need an operator's leave, which is nothing to an engine that is not vLLM.
RECORDING = """
import json
import numpy as np
import pyarrow as pa
from pipeline.engines.base import InvalidModel, ResultBatch, Task

class RecordingEngine:
    name = "recording"
    tasks = frozenset({Task.EMBED})
    @classmethod
    def check(cls, spec, model, schema):
        return (spec.column,)
    def __init__(self, model, task, options, context):
        self._options = json.dumps(options)
    def load(self): ...
    def close(self): ...
    def stats(self):
        return {}
    def result_schema(self, spec):
        return pa.schema([("options", pa.string())])
    def infer(self, spec, batches, cancel):
        for batch in batches:
            values = pa.record_batch({"options": pa.array([self._options] * len(batch.rows), pa.string())})
            yield ResultBatch(batch.rows, values)
"""
OPTIONS = {"tokenizer": "mine", "download_dir": "/nowhere", "load_format": "own"}

SUBMIT = """
import json, sys
from pipeline import Client
with Client() as client:
    print(json.dumps(client.submit(**json.loads(sys.argv[1])).wait(timeout=120).state))
"""


@dataclass(frozen=True, slots=True)
class Author:
    """An environment of its own beside the one that Rowmill is installed in, and a folder with the page's files."""

    folder: Path
    library: str
    environment: dict[str, str]

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment | more, capture_output=True, text=True, check=False
        )

    def job(self, engine: str, output: Path) -> dict[str, Any]:
        """A job on the page's model and rows."""
        model, rows = str(self.folder / "model"), str(self.folder / "texts.parquet")
        return {
            "input": rows,
            "output": str(output),
            "model": model,
            "engine": engine,
            "task": "embed",
            "column": "text",
        }


def blocks(language: str) -> list[tuple[str, str]]:
    return [(title, text) for kind, title, text in BLOCK.findall(PAGE.read_text()) if kind == language]


def commands() -> list[list[str]]:
    [(_, shell)] = blocks("sh")
    return [line.split() for line in shell.splitlines()]


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Author:
    """The page's files; its distribution is built and installed by the page's own command, without a network."""
    home = tmp_path_factory.mktemp("author")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python, scripts = home / "venv/bin/python", home / "venv/bin"
    library = sysconfig.get_path("purelib", vars={"base": str(home / "venv")})
    Path(library, "rowmill.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for name, module in {"pip": "pip", "pytest": "pytest", "rowmill": "pipeline.cli.main"}.items():
        (scripts / name).write_text(f'#!/bin/sh\nexec "{python}" -m {module} "$@"\n')
        (scripts / name).chmod(0o755)
    folder = home / "rowmill-hashing"
    folder.mkdir()
    files: dict[str, str] = {}
    for title, text in [*blocks("toml"), *blocks("python")]:
        files[title] = f"{files[title]}\n\n{text}" if title in files else text
    modules = 'py-modules = ["rowmill_hashing"]'
    entry = 'hashing = "rowmill_hashing:HashingEngine"\n'
    assert modules in files["pyproject.toml"]
    assert entry in files["pyproject.toml"]
    for name, text in files.items():
        (folder / name).write_text(text)
    recording = f'{entry}recording = "rowmill_recording:RecordingEngine"\n'
    project = files["pyproject.toml"].replace(entry, recording)
    project = project.replace(modules, 'py-modules = ["rowmill_hashing", "rowmill_recording"]')
    (folder / "pyproject.toml").write_text(project)
    (folder / "rowmill_recording.py").write_text(RECORDING)
    environment = os.environ | {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        # The build has what it needs here, and no index is asked.
        "PIP_NO_BUILD_ISOLATION": "false",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "ROWMILL_DATA_DIR": str(home / "data"),
        "ROWMILL_CACHE_DIR": str(home / "cache"),
    }
    made = Author(folder, library, environment)
    for command in commands()[:2]:
        done = made.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    # From here on it is the installed distribution that is found, not the folder it was built from.
    for name in ("rowmill_hashing.py", "rowmill_recording.py"):
        (folder / name).unlink()
    return made


@pytest.fixture
def installed(author: Author, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the author has installed, for this process."""
    monkeypatch.syspath_prepend(author.library)
    yield
    for name in ("rowmill_hashing", "rowmill_recording"):
        sys.modules.pop(name, None)


def test_the_commands_of_the_page(author: Author) -> None:
    """In the page's order; the contract holds, and the run ends as the page says."""
    assert [command[0] for command in commands()] == ["pip", "python", "pytest", "rowmill"]
    tests, run = commands()[2:]
    done = author.run(*tests)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 50, done.stdout
    done = author.run(*run)
    assert done.returncode == 4, done.stdout + done.stderr
    table = pq.read_table(author.folder / "vectors/data")
    first, second, other, missing = table["embedding"].to_pylist()
    assert missing is None
    assert table["error"].to_pylist()[3]["code"] == "missing_value"
    assert np.dot(first, second) > 0.7
    assert abs(np.dot(first, other)) < 0.4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"engine_options": {"tokenizer": "bytes"}}, "tokenizer: 'bytes' is none of words, trigrams"),
        ({"engine_options": {"width": 3}}, "width: there is no option 'width'; there are tokenizer, load_format"),
        ({"dimensions": 5}, "dimensions: engine 'hashing' does not do that"),
        ({"column": "words"}, "column: the input has no single column 'words'"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_what_the_page_refuses(author: Author, settings: Settings, tmp_path: Path, fields: Any, words: str) -> None:
    with Client(settings=settings) as client, pytest.raises(InvalidJob, match=re.escape(words)):
        client.submit(**author.job("hashing", tmp_path / "out") | fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("installed")
def test_options_reach_an_engine_in_an_embedded_run(author: Author, settings: Settings, tmp_path: Path) -> None:
    with Client(settings=settings) as client:
        job = author.job("recording", tmp_path / "out")
        handle = client.submit(**job, engine_options=OPTIONS)
        assert handle.wait(timeout=120).state is JobState.COMPLETED
        assert [json.loads(options) for options in handle.table()["options"].to_pylist()] == [OPTIONS] * 4


@pytest.mark.postgres
def test_a_celery_worker_runs_both_engines(
    author: Author, postgres_database: str, redis_url: str, tmp_path: Path
) -> None:
    """Options whose names are guarded in another engine reach this one, in a fleet too."""
    fleet = {
        "ROWMILL_DATABASE_URL": postgres_database,
        "ROWMILL_BROKER_URL": redis_url,
        "ROWMILL_TICK_SECONDS": "1",
    }
    jobs = [
        author.job("hashing", tmp_path / "hashing") | {"engine_options": {"tokenizer": "trigrams"}},
        author.job("recording", tmp_path / "recording") | {"engine_options": OPTIONS},
    ]
    log = tmp_path / "worker.log"
    with log.open("wb") as out:
        worker = subprocess.Popen(
            ["rowmill", "worker", "start", "--engines", "hashing,recording"],
            cwd=tmp_path,
            env=author.environment | fleet,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            for wanted in jobs:
                done = author.run("python", "-c", SUBMIT, json.dumps(wanted), **fleet)
                assert done.returncode == 0, done.stderr + log.read_text()
                assert json.loads(done.stdout) == "completed", log.read_text()
        finally:
            worker.send_signal(signal.SIGTERM)
            try:
                worker.wait(60)
            finally:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                    worker.wait()
    vectors = pq.read_table(tmp_path / "hashing/data")["embedding"]
    assert vectors.null_count == 1
    recorded = pq.read_table(tmp_path / "recording/data")["options"].to_pylist()
    assert [json.loads(options) for options in recorded] == [OPTIONS] * 4
    assert pa.types.is_fixed_size_list(vectors.type)
