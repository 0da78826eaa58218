"""However the process of an embedded job ends: what is finished is flushed, and the attempt is handed back."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from pipeline.config.settings import Settings
from tests.client.scripts import Place
from tests.faults.driver import REPOSITORY

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
    "SIGTERM in run": ("kill_later(signal.SIGTERM); client().run(**FIELDS)", -signal.SIGTERM),
    "SIGHUP while working": (WAIT + "kill_later(signal.SIGHUP)\nwhile True: time.sleep(0.01)", -signal.SIGHUP),
    "SIGTERM twice, as timeout sends it": (
        WAIT + "some_rows()\nfor number in (signal.SIGTERM, signal.SIGTERM): os.kill(os.getpid(), number)\njob.wait()",
        -signal.SIGTERM,
    ),
    "SIGTERM before a long call of native code": (
        WAIT + "import hashlib\nkill(signal.SIGTERM)\nhashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
        -signal.SIGTERM,
    ),
    "SIGTERM while another thread runs the job": (
        (
            "mine = client()\nthreading.Thread(target=lambda: mine.submit(**FIELDS).wait(), daemon=True).start()\n"
            "kill(signal.SIGTERM)\nwhile True: time.sleep(0.01)"
        ),
        -signal.SIGTERM,
    ),
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
        "assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL\nfrom pipeline.process import process_end\n"
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
