"""Tables, JSON and the words for numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from pipeline.cli import foreground, output
from pipeline.spec.status import JobStatus
from storage.states import JobState
from tests.cli.conftest import REPOSITORY


def test_a_table_is_aligned_and_cuts_nothing_off() -> None:
    text = output.table(("id", "rows", "model"), [("a", "1", "x" * 300), ("bcd", "1,000", "語")], right=("rows",))
    assert text.splitlines() == [
        "ID    ROWS  MODEL",
        "a        1  " + "x" * 300,
        "bcd  1,000  語",
    ]
    wide = output.table(("a", "b"), [("語", "1"), ("xy", "2")])
    assert wide.splitlines() == ["A   B", "語  1", "xy  2"]


def test_text_cannot_drive_the_terminal() -> None:
    assert output.printable("a\x1b[31mb\nc\x07\u202e") == "a\\x1b[31mb\\nc\\x07\\u202e"
    assert output.printable(None) == ""
    assert output.printable("naïve 語") == "naïve 語"


def test_pairs_leave_out_what_is_not_there() -> None:
    assert output.pairs([("state", "failed"), ("error", None), ("n", 0), ("x", "")]) == "state  failed\nn      0"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (360000, "4 d 4 h"),
        (-1, "0.0 s"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert output.duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0"), (0.251, "0.25"), (3.14, "3.1"), (12.6, "13"), (12345.6, "12,346"), (3.0, "3")]
)
def test_counts(number: float, words: str) -> None:
    assert output.count(number) == words


def test_json_has_a_version_and_survives_what_is_not_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit_json({"a": "語", "b": "\ud800"})
    assert json.loads(capsys.readouterr().out) == {"version": 1, "a": "語", "b": "?"}


def test_a_status_as_json(status: Callable[..., JobStatus]) -> None:
    made = status(state=JobState.CANCELLED, rows_total=5, rows_done=3, metadata={"a": "b"})
    shown = json.loads(json.dumps(made.to_json()))
    assert shown["state"] == "cancelled"
    assert shown["terminal"] and shown["partial"]
    assert shown["input"] == ["/data/in.parquet"]
    assert shown["metadata"] == {"a": "b"}


def test_the_last_words_of_a_run(status: Callable[..., JobStatus]) -> None:
    first = status(rows_total=100, rows_done=40, tokens={"prompt_tokens": 400, "completion_tokens": 40})
    last = status(
        state=JobState.COMPLETED,
        rows_total=100,
        rows_done=100,
        rows_failed=3,
        tokens={"prompt_tokens": 1000, "cached_tokens": 0, "completion_tokens": 140},
    )
    measures = foreground.measured(first, last, 2.0)
    assert measures["rows"] == 60
    assert measures["rows_from_before"] == 40
    assert measures["rows_per_second"] == 30
    assert measures["tokens_per_second"] == 350
    text = foreground.summary(last, Counter({"missing_value": 1, "prompt_too_long": 2}), measures)
    assert text.splitlines() == [
        "completed  100 rows in 2.0 s (30 rows/s, 350 tokens/s)",
        "  failed   3 rows: prompt_too_long 2, missing_value 1",
        f"  details  rowmill job errors {last.id}",
        "  resumed  40 rows were done before",
        "  tokens   prompt 1,000, completion 140",
        "  output   /data/out/data/",
        f"  job      {last.id}",
    ]


def test_the_last_words_of_a_failed_run_name_no_output(status: Callable[..., JobStatus]) -> None:
    last = status(state=JobState.FAILED, error="the engine died 4 times", rows_total=10)
    text = foreground.summary(last, {}, foreground.measured(last, last, 1.0))
    assert "reason  the engine died 4 times" in text
    assert "output" not in text


def test_a_retry_counts_its_own_work(status: Callable[..., JobStatus]) -> None:
    before, after = status(rows_total=10, rows_done=8, gen=1), status(rows_total=10, rows_done=10, gen=1)
    assert foreground.measured(before, after, 1.0)["rows"] == 2


def test_stdout_is_kept_for_data_while_libraries_print() -> None:
    code = """
import subprocess, sys
from pipeline.cli import output
with output.only_ours():
    print("python", flush=True)
    subprocess.run(["echo", "child"], check=True)
output.emit("data")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "data\n"
    assert set(done.stderr.split()) == {"python", "child"}
