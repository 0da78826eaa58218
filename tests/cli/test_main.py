"""The command as a whole: quick to start, plain about mistakes."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline.cli import streams
from pipeline.cli.job.fields import with_job_fields
from pipeline.cli.job.listing import StateName
from pipeline.spec.job_spec import JobSpec, Task
from storage.states import JobState
from tests.cli.conftest import REPOSITORY, Rowmill


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from typer.testing import CliRunner
from pipeline.cli.main import app
for words in (["--help"], ["run", "--help"], ["job", "--help"], ["doctor", "--help"]):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
heavy = {"pyarrow", "numpy", "sqlalchemy", "alembic", "celery", "kombu", "torch", "transformers", "onnxruntime",
         "vllm", "fsspec", "pydantic_settings", "redis"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "[]\n"


def test_the_names_offered_are_the_names_there_are() -> None:
    assert set(get_args(StateName)) == set(JobState)


@with_job_fields
def _command(invocation: Any, fields: dict[str, Any]) -> None: ...


def test_every_field_of_a_job_has_an_option_with_a_help_text() -> None:
    """Its type and its words are those of the field: nothing has to be written twice."""
    parameters = inspect.signature(_command).parameters
    assert set(JobSpec.model_fields) <= set(parameters)
    for name in JobSpec.model_fields:
        said = get_args(parameters[name].annotation)[1].help
        assert said.endswith(".") and "``" not in said and len(said) < 125, (name, said)
    kinds = {name: get_args(get_args(parameters[name].annotation)[0])[0] for name in JobSpec.model_fields}
    assert set(get_args(kinds["task"])) == set(Task)
    assert kinds["limit"] is int and kinds["video_frame_rate"] is float and kinds["normalize"] is bool
    assert kinds["adapters"] == list[str] and kinds["tools"] is Path


def test_version(rowmill: Rowmill) -> None:
    done = rowmill("--version")
    assert (done.code, done.out) == (0, f"rowmill {importlib.metadata.version('rowmill')}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "missing INPUT, -o/--output, -m/--model, -t/--task"),
        (["run", "x", "-o", "o", "-m", "fake", "-t", "guess"], "'guess' is not one of"),
        (["run", "x", "-o", "o", "-m", "fake", "-t", "generate", "--sampling", "max_tokens"], "not KEY=VALUE"),
        (["run", "x", "-o", "o", "-m", "fake", "-t", "tensor", "--keep", "a", "--keep-none"], "exclude each other"),
        (["run", "--spec", "nowhere.toml"], "no such file: nowhere.toml"),
        (["run", "--nonsense"], "No such option"),
        (["job", "list", "--state", "lost"], "'lost' is not one of"),
        (["config", "show", "--setting", "flush_row=1"], "did you mean 'flush_rows'"),
        (["nonsense"], "No such command"),
    ],
)
def test_a_mistake_is_told_plainly_and_ends_with_2(rowmill: Rowmill, words: list[str], said: str) -> None:
    done = rowmill(*words)
    assert done.code == 2
    assert done.out == ""
    assert said in " ".join(done.err.split())


def test_config_show(rowmill: Rowmill) -> None:
    (rowmill.home / "rowmill.toml").write_text(
        'broker_url = "redis://:hunter2@h/0"\n[storage_options.s3]\nkey = "AKX"\n'
    )
    done = rowmill("config", "show", "--setting", "slots=2", ROWMILL_FLUSH_ROW="1")
    assert done.code == 0
    lines = {line.split()[0]: line.split(None, 2)[1:] for line in done.out.splitlines() if line}
    assert lines["slots"] == ["2", "--setting"]
    assert lines["data_dir"][1] == "ROWMILL_DATA_DIR"
    assert lines["broker_url"] == ["redis://:***@h/0", str(rowmill.home / "rowmill.toml")]
    assert lines["storage_options.s3.key"][0] == "***"
    assert lines["max_failures"] == ["4", "default"]
    assert "did you mean ROWMILL_FLUSH_ROWS" in done.err
    shown = rowmill("config", "show", "--json").document
    assert shown["version"] == 1
    assert shown["settings"]["broker_url"] == {
        "value": "redis://:***@h/0",
        "kind": "project",
        "source": str(rowmill.home / "rowmill.toml"),
    }


def test_a_bad_setting_as_json(rowmill: Rowmill) -> None:
    done = rowmill("config", "show", "--json", ROWMILL_SLOTS="0")
    assert done.code == 2
    assert done.err.startswith("error: setting slots: ")
    assert done.document["version"] == 1
    assert done.document["error"]["type"] == "InvalidSettings"
    assert done.document["error"]["field"] == "slots"
    assert "ROWMILL_SLOTS" in done.document["error"]["message"]


def test_db_upgrade_can_be_repeated(rowmill: Rowmill) -> None:
    Path(rowmill.environment["ROWMILL_DATA_DIR"], "rowmill.db").unlink()
    first, second = rowmill("db", "upgrade"), rowmill("db", "upgrade", "--json")
    assert (first.code, second.code) == (0, 0)
    assert second.document["revision"] in first.out


def test_a_database_that_does_not_answer_ends_with_7(rowmill: Rowmill) -> None:
    done = rowmill("db", "upgrade", "--database-url", "postgresql://u:hunter2@127.0.0.1:1/d")
    assert done.code == 7
    assert "hunter2" not in done.err
    assert done.err.count("\n") <= 2


def test_messages_that_nobody_reads_end_no_job(rowmill: Rowmill) -> None:
    (rowmill.home / "in.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    process = subprocess.Popen(
        rowmill.command("run", "in.jsonl", "-o", "out", "-m", "fake", "-t", "generate", "-p", "{text}", "--json"),
        cwd=rowmill.home,
        env=rowmill.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.close()
    assert process.stdout is not None
    told = json.loads(process.stdout.read())
    assert process.wait(timeout=60) == 0
    assert told["job"]["state"] == "completed"


@pytest.mark.parametrize(
    ("size", "kept"), [("0", False), ("\u00b2", False), ("-5", False), ("9" * 20, False), ("80", True)]
)
def test_a_size_that_no_terminal_has_is_forgotten(monkeypatch: pytest.MonkeyPatch, size: str, *, kept: bool) -> None:
    monkeypatch.setenv("COLUMNS", size)
    streams.prepare()
    assert ("COLUMNS" in os.environ) is kept


def test_a_run_whose_result_nobody_reads_ends_as_its_job_did(rowmill: Rowmill) -> None:
    (rowmill.home / "rows.jsonl").write_text('{"text": "good"}\n{"text": "bad"}\n')
    options = ("-m", "fake", "-t", "generate", "-p", "{text}", "--set", "fail_rows_matching=bad", "-q")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            rowmill.command("run", "rows.jsonl", "-o", "out", *options),
            cwd=rowmill.home,
            env=rowmill.environment,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_ends_quietly(rowmill: Rowmill) -> None:
    reader, writer = subprocess.PIPE, subprocess.PIPE
    process = subprocess.Popen(
        rowmill.command("config", "show"),
        cwd=rowmill.home,
        env=rowmill.environment,
        stdout=reader,
        stderr=writer,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in err
    assert "error" not in err
