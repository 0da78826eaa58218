"""However the process of an embedded job ends: what is finished is flushed, and the attempt is handed back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jupyter_client.manager import start_new_kernel

from pipeline import Client
from pipeline.settings import Settings
from storage.states import AttemptState
from tests.faults.driver import REPOSITORY

ROWS = 400
BEFORE = 100
"""Rows that are computed before the end; the engine waits there."""
BATCH = 10
SCRIPT = """
import gc, multiprocessing, os, signal, sys, threading, time
from pipeline import Client

FIELDS = dict(input={input!r}, output={output!r}, model="fake", task="generate", prompt="{{text}}",
              engine_options=dict(gate_file={gate!r}, gate_after_rows={before}, rows_file={rows_file!r}))

def client():
    return Client(data_dir={data_dir!r}, cache_dir={data_dir!r}, read_batch_rows={batch})

def computed():
    try:
        return os.path.getsize({rows_file!r})
    except FileNotFoundError:
        return 0

def some_rows():
    while computed() < {before}:
        time.sleep(0.01)

def kill(number):
    some_rows()
    os.kill(os.getpid(), number)

def kill_later(number):
    threading.Thread(target=kill, args=(number,), daemon=True).start()

"""
WAIT = "job = client().submit(**FIELDS)\n"
ENDS = {
    "falls off": (WAIT + "some_rows()", 0),
    "sys.exit": (WAIT + "some_rows(); sys.exit(3)", 3),
    "exception": (WAIT + "some_rows(); raise KeyError('mine')", 1),
    "Ctrl-C in wait": (WAIT + "kill_later(signal.SIGINT); job.wait(progress=True)", -signal.SIGINT),
    "Ctrl-C in run": ("kill_later(signal.SIGINT); client().run(**FIELDS)", -signal.SIGINT),
    "error in on_progress": (
        (
            "def shown(status):\n    if computed() >= 100: raise KeyError('mine')\n"
            "client().run(on_progress=shown, **FIELDS)"
        ),
        1,
    ),
    "SIGTERM in wait": (WAIT + "kill_later(signal.SIGTERM); job.wait()", -signal.SIGTERM),
    "SIGHUP while working": (WAIT + "kill_later(signal.SIGHUP)\nwhile True: time.sleep(0.01)", -signal.SIGHUP),
    "a handler of one's own": (
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))\n" + WAIT + "kill(signal.SIGTERM)",
        7,
    ),
    "client forgotten": (WAIT + "del job; gc.collect(); some_rows()", 0),
    "forked children": (
        WAIT + "some_rows()\nfor end in (sys.exit, lambda: None, lambda: os.kill(os.getpid(), signal.SIGTERM)):\n"
        "    child = multiprocessing.get_context('fork').Process(target=end)\n    child.start(); child.join()\n"
        "    before = job.status().rows_done\n    assert threading.enumerate()[1:], 'the parent goes on'\n"
        "pid = os.fork()\nif pid == 0:\n    assert job.status().state == 'in_progress'\n    sys.exit(5)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5",
        0,
    ),
}


class Place:
    """A job's folders, and what a script left in them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.output, self.rows_file, self.data_dir, self.gate = (
            home / "out",
            home / "rows",
            home / "data",
            home / "gate",
        )
        self.values = {
            "input": str(home / "texts.parquet"),
            "output": str(self.output),
            "rows_file": str(self.rows_file),
            "data_dir": str(self.data_dir),
            "gate": str(self.gate),
            "before": BEFORE,
            "batch": BATCH,
        }
        pq.write_table(pa.table({"text": [f"text {n}" for n in range(ROWS)]}), self.values["input"])

    def script(self, text: str) -> str:
        return SCRIPT.format(**self.values) + text.replace("GATE", repr(str(self.gate)))

    def run(self, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", self.script(text)],
            cwd=REPOSITORY,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def computed(self) -> int:
        return self.rows_file.stat().st_size

    def check_released(self, settings: Settings) -> None:
        """One attempt, handed back; all that was computed is flushed but for what was inside the engine."""
        assert self.computed() == BEFORE
        mine = settings.model_copy(update={"data_dir": self.data_dir, "read_batch_rows": BATCH})
        with Client(settings=mine) as client:
            (status,) = client.jobs()
            job = client.job(status.id)
            assert [item.state for item in job.attempts()] == [AttemptState.RELEASED]
            assert (status.failures, status.losses) == (0, 0)
            assert BEFORE - BATCH <= status.rows_done <= BEFORE
            self.gate.touch()
            assert job.wait(timeout=60).rows_done == ROWS
            assert self.computed() == ROWS + BEFORE - status.rows_done
            assert job.table().num_rows == ROWS


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("end", ENDS)
def test_whichever_way_a_script_ends(place: Place, settings: Settings, end: str) -> None:
    text, code = ENDS[end]
    ended = place.run(text)
    assert ended.returncode == code, ended.stderr
    if "fork" not in end and "run" not in end and "on_progress" not in end:
        assert "rowmill job resume" in ended.stderr
    place.check_released(settings)


def test_a_signal_that_is_ignored_stays_ignored(place: Place) -> None:
    ended = place.run(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + WAIT + "kill(signal.SIGHUP)\n"
        "assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\nopen(GATE, 'w').close()\nprint(job.wait().state)\n"
        "assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL\nfrom pipeline import process_end\n"
        "job._session.close()\nassert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "completed"), ended.stderr


@pytest.mark.parametrize("end", ["restart", "shutdown"])
def test_a_notebooks_kernel_is_restarted(place: Place, settings: Settings, end: str) -> None:
    """As Jupyter does it, with a wait of the user's still running in a cell."""
    manager, kernel = start_new_kernel(cwd=str(REPOSITORY))
    try:
        kernel.execute_interactive(place.script("job = client().submit(**FIELDS); some_rows()"), timeout=60)
        kernel.execute("job.wait(progress=True)")
        kernel.stop_channels()
        if end == "restart":
            manager.restart_kernel()
        else:
            manager.shutdown_kernel()
    finally:
        manager.shutdown_kernel(now=True)
    place.check_released(settings)
