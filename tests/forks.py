"""``python -m MODULE`` without the second and a half that a fresh interpreter needs to import Rowmill.

The session has one process that has imported everything and does nothing else (``multiprocessing``'s fork server). What
is started here is a fork of it: a real process with its own environment, files and signals. Its module runs as
``__main__``. A test whose subject is the start itself takes ``subprocess``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import disks

# Nothing here starts a thread or reads the settings when it is imported (``tasks.app`` does).
_IMPORTED = ["celery.apps.beat", "celery.apps.worker", "celery.bin.celery", "celery.concurrency.thread", "psycopg"]
_IMPORTED += ["pipeline.cli.main", "pipeline.engines.fake.engine", "pipeline.worker.worker", "tests.faults.driver"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(_IMPORTED)


class Fork:
    """A started ``python -m MODULE ARGUMENTS…`` in a session of its own; has what is needed of ``subprocess.Popen``."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], out: Path, err: Path, cwd: Path) -> None:
        """``command``: the module and its arguments; ``out`` and ``err``: files for what it writes."""
        given = (list(command), dict(environment), str(out), str(err), str(cwd))
        self._process = _SERVER.Process(target=_become, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Harmless when it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(command: list[str], environment: dict[str, str], out: str, err: str, cwd: str) -> None:
    os.setsid()
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv[:] = command
    disks.do_not_wait()
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # the module is imported already: yes
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
