"""Whole jobs from the command line, with the built-in fake engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import Rowmill

PROMPT = ("-m", "fake", "-t", "generate", "-p", "Say: {text}")


@pytest.fixture
def texts(rowmill: Rowmill) -> Callable[..., Path]:
    """Write ``texts.parquet`` with ``n`` rows; those in ``null`` have no text."""

    def write(n: int, null: tuple[int, ...] = ()) -> Path:
        path = rowmill.home / "texts.parquet"
        column = [None if i in null else f"text {i}" for i in range(n)]
        pq.write_table(pa.table({"id": range(n), "text": pa.array(column, pa.string())}), path, row_group_size=500)
        return path

    return write


def _output(rowmill: Rowmill, out: str = "out") -> pa.Table:
    return pq.read_table(rowmill.home / out / "data")


def _only_job(rowmill: Rowmill) -> dict[str, Any]:
    (job,) = rowmill.inside("job", "list", "--json").document["jobs"]
    found: dict[str, Any] = job
    return found


def test_a_run_from_input_to_output(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    texts(100)
    done = rowmill("run", "texts.parquet", "-o", "out", *PROMPT, "--sampling", "max_tokens=8")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("completed  100 rows in ")
    assert f"  output  {rowmill.home}/out/data/" in lines
    assert "\x1b" not in done.out + done.err
    table = _output(rowmill)
    assert table["id"].to_pylist() == list(range(100))
    assert table["error"].null_count == 100
    assert table["output"].null_count == 0
    assert (rowmill.home / "out" / "_SUCCESS").exists()


def test_json_and_quiet(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    texts(10)
    done = rowmill("run", "texts.parquet", "-o", "out", *PROMPT, "--json", "-q", "--metadata", "run=7")
    assert (done.code, done.err) == (0, "")
    document = done.document
    assert document["version"] == 1
    assert document["job"]["state"] == "completed"
    assert document["job"]["rows_done"] == 10
    assert document["job"]["metadata"] == {"run": "7"}
    assert document["run"]["rows"] == 10
    assert document["failed_codes"] == {}


def test_failed_rows_end_with_4_and_are_counted_by_code(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    texts(50, null=(3, 30))
    done = rowmill.inside("run", "texts.parquet", "-o", "out", *PROMPT)
    assert done.code == 4
    assert "failed   2 rows: missing_value 2" in done.out
    job = _only_job(rowmill)["id"]
    shown = rowmill.inside("job", "errors", job[:13])
    assert shown.code == 0
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == [
        ["3", "missing_value"],
        ["30", "missing_value"],
    ]
    limited = rowmill.inside("job", "errors", job, "--limit", "1", "--json").document
    assert [error["row"] for error in limited["errors"]] == [3]
    assert limited["more"]
    row = rowmill.inside("job", "show", job, "--row", "30", "--json").document["request"]
    assert (row["state"], row["code"]) == ("failed", "missing_value")
    assert rowmill.inside("job", "show", job, "--row", "0", "--json").document["request"]["state"] == "succeeded"
    assert rowmill.inside("job", "show", job, "--row", "50").code == 6


def test_too_many_failed_rows_end_with_3(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    texts(50, null=tuple(range(10)))
    done = rowmill.inside("run", "texts.parquet", "-o", "out", *PROMPT, "--max-failed-rows", "5")
    assert done.code == 3, done.err
    assert done.out.startswith("failed ")
    assert "reason" in done.out


def test_a_finished_output_is_kept_unless_asked(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    texts(10)
    arguments = ("run", "texts.parquet", "-o", "out", *PROMPT)
    assert rowmill.inside(*arguments).code == 0
    again = rowmill.inside(*arguments)
    assert again.code == 0  # so that a script may repeat it until it succeeds
    assert "has done this already" in again.err
    other = rowmill.inside(*arguments, "--shard-rows", "5")
    assert other.code == 2
    assert "output" in other.err
    assert other.out == ""
    assert rowmill.inside(*arguments, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("-p", "Say: {txt}"), "txt"),
        (("-p", "Say: {text"), "unbalanced"),
        (("--sampling", "max_tokenz=1"), "max_tokenz"),
        (("--keep", "nope"), "nope"),
        (("-e", "nope"), "nope"),
        (("-m", "./no/such/model"), "no/such/model"),
        (("-t", "embed"), "column"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    rowmill: Rowmill, texts: Callable[..., Path], change: tuple[str, str], said: str
) -> None:
    texts(3)
    done = rowmill.inside("run", "texts.parquet", "-o", "out", *PROMPT, *change)
    assert done.code == 2, done.err
    assert done.err.startswith("error: ")
    assert said in done.err
    assert done.out == ""
    assert not (rowmill.home / "out").exists()


def test_inputs_that_cannot_be_read(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    assert rowmill.inside("run", "nowhere.parquet", "-o", "out", *PROMPT).code == 2
    (rowmill.home / "broken.parquet").write_bytes(b"PAR1 not really PAR1")
    done = rowmill.inside("run", "broken.parquet", "-o", "out", *PROMPT, "--json")
    assert done.code == 2
    assert "broken.parquet" in done.document["error"]["message"]


def test_a_spec_file_and_options_over_it(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    texts(5)
    spec = {
        "input": "texts.parquet",
        "output": "elsewhere",
        "model": "fake",
        "task": "generate",
        "prompt": "{text}",
        "sampling": {"max_tokens": 4, "seed": 1},
    }
    (rowmill.home / "job.json").write_text(json.dumps(spec))
    done = rowmill.inside("run", "--spec", "job.json", "-o", "out", "--sampling", "max_tokens=6", "--keep", "id")
    assert done.code == 0, done.err
    assert "text" not in _output(rowmill).column_names
    manifest = json.loads((rowmill.home / "out" / "_manifest.json").read_text())
    assert manifest["spec"]["sampling"] == {"max_tokens": 6, "seed": 1}


def test_looking_at_jobs(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    empty = rowmill.inside("job", "list")
    assert (empty.code, empty.out) == (0, "")
    texts(10)
    for out in ("a", "b", "c"):
        assert rowmill.inside("run", "texts.parquet", "-o", out, *PROMPT, "-q").code == 0
    page = rowmill.inside("job", "list", "--json", "--limit", "2").document
    outputs = [Path(job["output"]).name for job in page["jobs"]]
    rest = rowmill.inside("job", "list", "--json", "--limit", "2", "--after", page["after"]).document
    outputs += [Path(job["output"]).name for job in rest["jobs"]]
    assert outputs == ["c", "b", "a"]
    assert rest["after"] is None
    job = page["jobs"][0]["id"]
    listed = rowmill.inside("job", "list", "--state", "completed")
    assert [line.split()[0] for line in listed.out.splitlines()][:2] == ["ID", job[-8:]]
    assert rowmill.inside("job", "list", "--state", "failed").out == ""
    shown = rowmill.inside("job", "show", job, "--attempts", "--events")
    assert shown.code == 0
    assert "10 of 10 done (100%)" in shown.out
    assert "succeeded" in shown.out
    assert re.search(r"^time +read \d+\.\d%, engine \d+\.\d%, write \d+\.\d%$", shown.out, re.MULTILINE)
    measured = rowmill.inside("job", "show", job, "--json").document["measured"]
    assert measured["rows"] == 10
    assert 0 < measured["write_share"] <= 1
    assert rowmill.inside("job", "wait", job).code == 0
    assert rowmill.inside("job", "watch", job).code == 0
    assert rowmill.inside("job", "show", "ffffffff").code == 6
    ambiguous = rowmill.inside("job", "show", "0")
    assert ambiguous.code in (2, 6)
    assert ambiguous.err.startswith("error: ")


def test_retry_computes_the_failed_rows_again(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    texts(20, null=(4,))
    assert rowmill.inside("run", "texts.parquet", "-o", "out", *PROMPT).code == 4
    job = _only_job(rowmill)["id"]
    again = rowmill.inside("job", "retry", job, "--json")
    assert again.code == 4
    assert again.document["job"]["gen"] == 1
    assert _output(rowmill)["error"].null_count == 19
    queued = rowmill.inside("job", "retry", job, "--no-run")
    assert queued.code == 0
    assert _only_job(rowmill)["state"] == "queued"
    assert rowmill.inside("job", "wait", job).code == 4


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_flushes_and_the_same_command_resumes(
    rowmill: Rowmill, texts: Callable[..., Path], number: signal.Signals
) -> None:
    texts(3000)
    gate, reached = rowmill.home / "gate", rowmill.home / "reached"
    faults = {"gate_file": str(gate), "gate_after_rows": 1000, "touch_after_rows": [1000, str(reached)]}
    words = ["run", "texts.parquet", "-o", "out", *PROMPT, "--setting", "read_batch_rows=100"]
    words += [f"--set={name}={json.dumps(value)}" for name, value in faults.items()]
    process = subprocess.Popen(
        rowmill.command(*words),
        cwd=rowmill.home,
        env=rowmill.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(reached, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 5, err
    assert out == ""
    assert "flushing" in err
    assert "To resume, run the same command:\n  rowmill run texts.parquet -o out" in err
    assert "Traceback" not in err
    job = _only_job(rowmill)
    assert not job["terminal"]
    assert 0 < job["rows_done"] < 3000
    assert not (rowmill.home / "out" / "_SUCCESS").exists()

    gate.touch()
    done = rowmill.inside(*words, "--json")
    assert done.code == 0, done.err
    assert done.document["job"]["id"] == job["id"]
    assert done.document["run"]["rows_from_before"] == job["rows_done"]
    assert _output(rowmill)["id"].to_pylist() == list(range(3000))
    attempts = rowmill.inside("job", "show", job["id"], "--attempts", "--json").document["attempts"]
    assert sum(attempt["computed"] for attempt in attempts) == 3000
    assert [attempt["state"] for attempt in attempts] == ["released", "succeeded"]


def test_cancel_a_job_that_was_interrupted(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    texts(300)
    reached = rowmill.home / "reached"
    faults = [f"--set=gate_file={rowmill.home}/gate", "--set=gate_after_rows=100"]
    faults += [f"--set=touch_after_rows={json.dumps([100, str(reached)])}", "--setting", "read_batch_rows=100"]
    process = subprocess.Popen(
        rowmill.command("run", "texts.parquet", "-o", "out", *PROMPT, *faults, "--json"),
        cwd=rowmill.home,
        env=rowmill.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(reached, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    document = json.loads(out)
    assert document["error"]["exit_code"] == 5
    assert document["resume"].startswith("rowmill run texts.parquet")
    job = document["job"]["id"]
    assert document["job"]["rows_done"] == _only_job(rowmill)["rows_done"]
    cancelled = rowmill.inside("job", "cancel", job)
    assert cancelled.code == 0
    assert cancelled.out.startswith(f"{job}  cancelled")
    shown = rowmill.inside("job", "wait", job, "--json")
    assert shown.code == 5
    assert shown.document["job"]["partial"]
    assert len(_output(rowmill)) == shown.document["job"]["rows_done"]


def test_on_a_terminal_there_is_a_bar_on_stderr_and_data_alone_on_stdout(
    rowmill: Rowmill, texts: Callable[..., Path]
) -> None:
    texts(50)
    ours, theirs = os.openpty()
    environment = {**rowmill.environment, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(
        rowmill.command("run", "texts.parquet", "-o", "out", *PROMPT, "--json"),
        cwd=rowmill.home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    err = b""
    try:
        while chunk := os.read(ours, 65536):
            err += chunk
    except OSError:
        pass  # how Linux says that the other end of a terminal is closed
    finally:
        os.close(ours)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(out)["job"]["state"] == "completed"
    assert "\u2501" in err.decode()  # the bar
    assert b"\x1b[?25h" in err  # the cursor is shown again


def test_some_rows_and_what_all_would_take(rowmill: Rowmill, texts: Callable[..., Path]) -> None:
    texts(400)
    done = rowmill.inside("run", "texts.parquet", "-o", "some", *PROMPT, "--limit", "40")
    assert done.code == 0, done.err
    assert re.search(
        r"^all 400 rows would take about [\d.]+ \w+, [\d,]+ prompt and [\d,]+ completion tokens$", done.err, re.M
    )
    document = rowmill.inside("run", "texts.parquet", "-o", "more", *PROMPT, "--sample", "40", "--json").document
    assert (document["job"]["rows_total"], document["job"]["input_rows"]) == (40, 400)
    assert document["all_rows"]["rows"] == 400
    assert document["all_rows"]["seconds"] > 0
    assert document["all_rows"]["prompt_tokens"] == 10 * document["job"]["tokens"]["prompt_tokens"]
    whole = rowmill.inside("run", "texts.parquet", "-o", "all", *PROMPT, "--limit", "400", "--json")
    assert "all_rows" not in whole.document
    assert "would take" not in whole.err
    for wrong in ("0", "-1", str(2**63)):
        refused = rowmill.inside("run", "texts.parquet", "-o", "none", *PROMPT, "--limit", wrong)
        assert (refused.code, refused.out) == (2, "")
        assert "limit" in refused.err
