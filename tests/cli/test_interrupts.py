"""Ctrl-C: real signals to real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

from pipeline.cli.interrupts import InterruptWatch
from tests.cli.conftest import REPOSITORY

CHILD = """
import signal, sys, threading, time
from pipeline.cli import interrupts
# A test run under nohup, or in the background of a shell, hands down ignored signals, which would be respected.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
interrupts._SAME_KEY_PRESS_SECONDS = 0.0
asked = threading.Event()
def first():
    print("first", flush=True)
    asked.set()
with interrupts.InterruptWatch(first, lambda: interrupts.end_now("ended at once", 130)):
    print("ready", flush=True)
    if sys.argv[1] == "once":
        asked.wait()
    else:
        threading.Event().wait()  # the main thread never comes back
print("clean", flush=True)
"""


def _start(mode: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_the_first_signal_asks_for_a_clean_end() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        child = _start("once")
        child.send_signal(number)
        out, _ = child.communicate(timeout=60)
        assert out == "first\nclean\n"
        assert child.returncode == 0


def test_the_second_signal_ends_at_once() -> None:
    child = _start("never")
    assert child.stdout is not None
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "first\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "ended at once" in err


def test_one_key_press_that_arrives_twice_is_one_wish() -> None:
    first, again = threading.Event(), threading.Event()
    with InterruptWatch(first.set, again.set):
        signal.raise_signal(signal.SIGINT)
        assert first.wait(60)
        signal.raise_signal(signal.SIGINT)
    assert not again.is_set()


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with InterruptWatch(lambda: None, lambda: None):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen = []

    def work() -> None:
        with InterruptWatch(lambda: None, lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
