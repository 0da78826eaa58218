"""Scripts as users write them, each in a process of its own, over a job whose engine waits in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import Client
from pipeline.config.settings import Settings
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
