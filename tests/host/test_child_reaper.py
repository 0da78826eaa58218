"""The guardian ends the processes it watches, and no others, when its owner is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from pipeline.host import child_reaper

OWNER = """
import os, signal, subprocess, sys
from pipeline.host.child_reaper import Guardian

PAUSE = "import signal; signal.pause()"
WITH_CHILD = (
    "import signal, subprocess, sys; print(subprocess.Popen([sys.executable, '-I', '-S', '-c', sys.argv[1]], "
    "stdout=subprocess.DEVNULL).pid, flush=True); signal.pause()"
)
python = [sys.executable, "-I", "-S", "-c"]
family = subprocess.Popen([*python, WITH_CHILD, PAUSE], stdout=subprocess.PIPE, text=True, start_new_session=True)
other = subprocess.Popen([*python, PAUSE], stdout=subprocess.DEVNULL, start_new_session=True)
guardian = Guardian()
guardian.watch(family.pid)
forked = os.fork() if "fork" in sys.argv else other.pid
if forked == 0:
    signal.pause()
print(family.pid, family.stdout.readline().strip(), other.pid, forked, guardian.pid, flush=True)
sys.stdin.read()
if "close" in sys.argv:
    guardian.close()
"""


class Owner:
    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        found = [psutil.Process(int(pid)) for pid in self.process.stdout.readline().split()]
        self.family, self.others, self.guardian = found[:2], found[2:4], found[4]

    def leave(self) -> None:
        """End of its own accord."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def clean_up(self) -> None:
        for process in [*self.family, *self.others, self.guardian]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    owner = Owner(*getattr(request, "param", ()))
    yield owner
    owner.clean_up()


# The second: a forked copy of the owner lives on, and must not hold the pipe open.
@pytest.mark.parametrize("owner", [(), ("fork",)], indirect=True, ids=["alone", "with a forked copy"])
def test_kill_9_of_the_owner_ends_the_watched_and_their_children_but_nothing_else(owner: Owner) -> None:
    owner.process.kill()
    _, alive = psutil.wait_procs([*owner.family, owner.guardian], timeout=30)
    assert not alive, "watched processes live on after their owner"
    assert all(process.is_running() for process in owner.others)


@pytest.mark.parametrize("owner", [("close",)], indirect=True)
def test_close_ends_the_guardian_and_leaves_the_watched(owner: Owner) -> None:
    owner.leave()
    _, alive = psutil.wait_procs([owner.guardian], timeout=30)
    assert not alive
    assert all(process.is_running() for process in owner.family)


def test_ending_without_close_counts_as_gone(owner: Owner) -> None:
    owner.leave()
    _, alive = psutil.wait_procs(owner.family, timeout=30)
    assert not alive


def test_a_reused_pid_is_not_hit() -> None:
    bystander = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"])
    try:
        started = child_reaper.start_time(bystander.pid)
        assert started is not None
        command = [sys.executable, "-I", "-S", child_reaper.__file__]
        assert subprocess.run(command, input=f"{bystander.pid} {started - 1}\n", text=True).returncode == 0
        assert bystander.poll() is None
        # The same, told the truth, does kill: so it was the start time that spared it.
        assert subprocess.run(command, input=f"{bystander.pid} {started}\n", text=True).returncode == 0
        assert bystander.wait(timeout=30) == -signal.SIGKILL
    finally:
        bystander.kill()
        bystander.wait()


def test_close_twice_and_after_the_guardian_was_killed() -> None:
    watcher = child_reaper.Guardian()
    os.kill(watcher.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(watcher.pid)], timeout=30)
    watcher.watch(os.getpid())
    watcher.close()
    watcher.close()


def test_a_zombie_has_no_start_time() -> None:
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert child_reaper.start_time(process.pid) is None
    process.wait()
    assert child_reaper.start_time(process.pid) is None
