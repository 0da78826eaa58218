"""Rates, estimates and lines, with a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pipeline.client import progress
from pipeline.client.progress import Bar, Lines, Notebook, Silent
from pipeline.spec.rates import Rates, describe, describe_shortly, doing
from pipeline.spec.status import JobStatus, Phase
from storage.states import JobState

Make = Callable[..., JobStatus]


def test_rates_and_time_left(status: Make) -> None:
    rates = Rates()
    rates.update(status(rows_total=1000), 0.0)
    assert rates.rows is None
    assert rates.remaining(0.0) is None
    rates.update(status(rows_total=1000, rows_done=100, tokens={"prompt_tokens": 500, "completion_tokens": 100}), 10.0)
    assert rates.rows == 10
    assert rates.tokens == 60
    assert rates.remaining(10.0) == 90


def test_between_flushes_the_rate_stands_and_the_time_left_runs_down(status: Make) -> None:
    rates = Rates()
    rates.update(status(rows_total=1000), 0.0)
    rates.update(status(rows_total=1000, rows_done=100), 10.0)
    rates.update(status(rows_total=1000, rows_done=100), 30.0)
    assert rates.rows == 10
    assert rates.remaining(30.0) == 70
    assert rates.remaining(500.0) == 0


def test_old_moves_are_forgotten(status: Make) -> None:
    rates = Rates()
    for second, rows in [(0, 0), (300, 10), (600, 20), (630, 3020), (840, 24020)]:
        rates.update(status(rows_total=90_000, rows_done=rows), float(second))
    assert rates.rows == 100


def test_rows_that_were_done_before_are_not_counted(status: Make) -> None:
    rates = Rates()
    rates.update(status(rows_total=1000, rows_done=900), 0.0)
    rates.update(status(rows_total=1000, rows_done=910), 1.0)
    assert rates.rows == 10


def test_planning_does_not_slow_the_estimate(status: Make) -> None:
    rates = Rates()
    rates.update(status(state=JobState.VALIDATING), 0.0)
    rates.update(status(state=JobState.QUEUED, rows_total=100), 1000.0)
    rates.update(status(rows_total=100), 1000.0)
    rates.update(status(rows_total=100, rows_done=50), 1001.0)
    assert rates.rows == 50


def test_loading_does_not_slow_the_estimate(status: Make) -> None:
    rates = Rates()
    rates.update(status(rows_total=100, phase=Phase.LOADING), 0.0)
    rates.update(status(rows_total=100, phase=Phase.COMPUTING), 100.0)
    rates.update(status(rows_total=100, rows_done=20, phase=Phase.COMPUTING), 110.0)
    assert rates.rows == 2
    assert rates.remaining(110.0) == 40
    # The engine died, and is loaded again: the time left stands meanwhile.
    rates.update(status(rows_total=100, rows_done=20, phase=Phase.LOADING), 110.0)
    rates.update(status(rows_total=100, rows_done=20, phase=Phase.LOADING), 500.0)
    assert rates.remaining(500.0) == 40
    rates.update(status(rows_total=100, rows_done=20, phase=Phase.COMPUTING), 500.0)
    rates.update(status(rows_total=100, rows_done=40, phase=Phase.COMPUTING), 510.0)
    assert rates.rows == 2
    assert rates.remaining(510.0) == 30


def test_rows_that_fail_at_once_are_no_speed(status: Make) -> None:
    rates = Rates()
    rates.update(status(rows_total=1000), 0.0)
    rates.update(status(rows_total=1000, rows_done=500, rows_failed=500), 1.0)
    assert rates.rows is None
    rates.update(status(rows_total=1000, rows_done=600, rows_failed=500), 11.0)
    assert rates.remaining(11.0) == pytest.approx(400 / rates.rows)  # type: ignore[operator]
    assert rates.rows == pytest.approx(100 / 11)


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (Phase.UNPLANNED, "waiting for a planner for 12 s"),
        (Phase.READING, "reading the input for 12 s"),
        (Phase.WAITING, "waiting for a worker for 12 s"),
        (Phase.RETRYING, "waiting to try again for 12 s"),
        (Phase.LOADING, "loading the engine for 12 s"),
        (Phase.PUBLISHING, "publishing for 12 s"),
        (Phase.STOPPING, "stopping for 12 s"),
    ],
)
def test_what_a_job_waits_for_is_said_with_the_time_that_passes(status: Make, phase: Phase, words: str) -> None:
    now = status(rows_total=100, phase=phase, phase_seconds=12.0)
    assert describe(now, Rates(), 0.0) == f"in_progress: {words}, 0 of 100 rows (0%)"
    assert describe_shortly(now, Rates(), 0.0) == "12 s · 0/100"
    assert describe_shortly(now, Rates(), 0.0, 99.0) == "1 min 39 s · 0/100"


def test_a_job_that_nobody_runs_does_not_seem_to_run(status: Make) -> None:
    assert doing(status(attended=False, interrupted=True, phase=Phase.LOADING)) == "interrupted"
    assert doing(status(attended=False, phase=Phase.WAITING)) == "nobody runs it"


def test_counts_that_fall_for_a_moment_change_nothing(status: Make) -> None:
    rates = Rates()
    rates.update(status(rows_total=100), 0.0)
    rates.update(status(rows_total=100, rows_done=50), 1.0)
    shown = rates.update(status(rows_total=100, rows_done=10), 2.0)
    assert shown.rows_done == 50
    assert rates.rows == 50


def test_a_retry_starts_anew(status: Make) -> None:
    rates = Rates()
    rates.update(status(rows_total=100, rows_done=50), 0.0)
    rates.update(status(rows_total=100, rows_done=100), 1.0)
    assert rates.update(status(rows_total=100, rows_done=90, gen=1), 2.0).rows_done == 90
    assert rates.rows is None


def test_lines(status: Make) -> None:
    rates = Rates()
    assert describe(status(state=JobState.VALIDATING), rates, 0.0) == "validating"
    rates.update(status(rows_total=20_000), 0.0)
    now = status(rows_total=20_000, rows_done=4_096, rows_failed=3, tokens={"prompt_tokens": 10_000})
    rates.update(now, 4.0)
    assert describe(now, rates, 4.0) == (
        "in_progress: 4,096 of 20,000 rows (20%), 1,023 rows/s, 2,500 tokens/s, 16 s left, 3 failed"
    )
    assert describe_shortly(now, rates, 4.0) == ("4,096/20,000 · 1,023 rows/s · 2,500 tokens/s · 16 s left · 3 failed")


def test_without_a_terminal_a_line_is_written_now_and_then(status: Make) -> None:
    now, written = [0.0], list[str]()
    lines = Lines(written.append, lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        lines.update(status(rows_total=100, rows_done=second))
    assert [line.split(",")[0] for line in written] == [
        "in_progress: 0 of 100 rows (0%)",
        "in_progress: 10 of 100 rows (10%)",
        "in_progress: 20 of 100 rows (20%)",
    ]
    lines.update(status(state=JobState.COMPLETED, rows_total=100, rows_done=100))
    assert written[-1].startswith("completed: 100 of 100 rows (100%)")
    lines.notice("hello")
    assert written[-1] == "hello"


def test_the_kind_that_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(progress.progress(quiet=True)) is Silent
    assert type(progress.progress(quiet=False)) is Lines
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert type(progress.progress(quiet=False)) is Bar
    monkeypatch.setenv("TERM", "dumb")
    assert type(progress.progress(quiet=False)) is Lines
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    assert type(progress.progress()) is Notebook
    assert type(progress.progress(quiet=True)) is Silent


def test_the_bar_takes_every_kind_of_status(status: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(clock=lambda: 0.0) as bar:
        bar.update(status(state=JobState.VALIDATING))
        bar.update(status(rows_total=10, rows_done=5))
        bar.notice("[red]exporting[/red]\x1b[0m")
        bar.update(status(state=JobState.COMPLETED, rows_total=10, rows_done=10))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[red]exporting[/red]\\x1b[0m" in captured.err


def test_the_bar_says_what_it_waits_for_while_nothing_is_reported(
    status: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    bar = Bar(clock=lambda: now[0], keep=True)
    now[0] = 7.0
    assert bar._beside() == "7.0 s"  # nothing was told yet: the input is read
    with bar:
        bar.update(status(rows_total=50, phase=Phase.LOADING, phase_seconds=3.0))
        now[0] = 27.0
        assert bar._beside() == "23 s · 0/50"
        bar.update(status(state=JobState.COMPLETED, rows_total=50, rows_done=50))
    assert capsys.readouterr().err.splitlines()[-1].startswith("completed: 50 of 50 rows (100%)")


def test_lines_say_that_the_input_is_read_when_that_takes_long(status: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    written: list[str] = []
    said = threading.Event()

    def write(line: str) -> None:
        written.append(line)
        said.set()

    with Lines(write):
        assert said.wait(60)
        assert written == ["reading the input for 0.0 s"]
    monkeypatch.setattr(progress, "LINE_SECONDS", 3600.0)
    with Lines(written.append) as lines:
        lines.update(status(rows_total=5))
        lines._say_reading()
    assert len(written) == 2


def test_lines_tell_a_change_of_phase_at_once(status: Make) -> None:
    written: list[str] = []
    lines = Lines(written.append, lambda: 0.0)
    lines.update(status(rows_total=5, phase=Phase.LOADING, phase_seconds=0.0))
    lines.update(status(rows_total=5, phase=Phase.LOADING, phase_seconds=2.0))
    lines.update(status(rows_total=5, phase=Phase.COMPUTING))
    assert written == ["in_progress: loading the engine for 0.0 s, 0 of 5 rows (0%)", "in_progress: 0 of 5 rows (0%)"]


@pytest.mark.parametrize("size", ["0", "\u00b2", "-5"])
def test_a_terminal_of_no_size_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("COLUMNS", size)
    assert progress.console().width >= 1
    monkeypatch.setenv("COLUMNS", "40")
    assert progress.console().width == 40
