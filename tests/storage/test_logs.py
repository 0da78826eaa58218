"""The log: a closed vocabulary of actions, ids on every record, JSON on every line, no secrets."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog.contextvars
from hypothesis import given
from hypothesis import strategies as st

import storage
from storage import logs
from storage.log_actions import Action

ROOT = Path(storage.__file__).parent.parent
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "failure"}
SECRET = "s3cr3tPW"


class Capture:
    """A logger of its own, and what its handler has written."""

    def __init__(self, log_format: logs.LogFormat) -> None:
        self._stream = io.StringIO()
        handler = logging.StreamHandler(self._stream)
        logs.format_as(log_format, [handler])
        self.foreign = logging.getLogger(f"tests.{id(self)}")
        self.foreign.propagate = False
        self.foreign.setLevel("INFO")
        self.foreign.addHandler(handler)
        self.own = logs.get_logger(self.foreign.name)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def captured() -> Capture:
    return Capture("json")


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    """Where, and the call: every one of a module's ``log``."""
    for package in ("pipeline", "tasks", "storage"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS:
                    owner = ast.unparse(node.func.value)
                    if owner.rpartition(".")[2] in {"log", "service_log", "logger", "logging"}:
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_every_record_of_ours_names_an_action_of_the_vocabulary() -> None:
    used = set()
    for where, call in log_calls():
        (action,) = [ast.unparse(word.value) for word in call.keywords if word.arg == "action"] or [""]
        name = action.removeprefix("Action.")
        assert action.startswith("Action.") and name in Action.__members__, f"{where} names no action"
        used.add(Action[name])
    assert used == set(Action), "nothing logs these"


def test_actions_have_the_form_that_consumers_rely_on() -> None:
    assert len({action.value for action in Action}) == len(Action.__members__), "two names for one action"
    for name, action in Action.__members__.items():
        assert re.fullmatch(r"[a-z]+\.[a-z]+(_[a-z]+)*", action)
        assert name == action.upper().replace(".", "_")


def test_a_record_carries_its_action_and_what_is_bound(captured: Capture) -> None:
    with logs.bound(job_id="j", shard=3, colour="red"):
        captured.own.warning("no answer from %s", "db", action=Action.DATABASE_AWAITED, attempt=2)
        captured.foreign.info("statement %d", 7)
    captured.own.info("later", action=Action.JOB_DELETED)
    ours, theirs, later = captured.records
    assert ours.pop("timestamp").endswith("Z")
    assert ours == {
        "event": "no answer from db",
        "level": "warning",
        "logger": captured.foreign.name,
        "action": "database.awaited",
        "job_id": "j",
        "shard": 3,
        "attempt": 2,
    }
    assert (theirs["event"], theirs["job_id"], theirs["shard"]) == ("statement 7", "j", 3)
    assert "action" not in theirs
    assert "job_id" not in later


def test_threads_take_the_ids_along(captured: Capture) -> None:
    def work() -> None:
        captured.foreign.info("in a thread")

    with logs.bound(job_id="j"):
        thread = logs.thread_with_ids("test", work)
        pool = logs.pool_with_ids(1, "test")
    thread.start()
    thread.join()
    with pool:
        pool.submit(work).result()
    assert [record["job_id"] for record in captured.records] == ["j", "j"]


def test_a_program_may_bind_names_that_no_record_can_carry(captured: Capture) -> None:
    with structlog.contextvars.bound_contextvars(name="x", message="y", args=1):
        captured.own.info("fine", action=Action.JOB_DELETED)
    assert captured.records[0]["event"] == "fine"


@given(
    st.text(), st.sampled_from(['password="{}"', "redis://:{}@h", "api_key={}", '{{"secret_key": "{}"}}', "Bearer {}"])
)
def test_json_stays_json_whatever_is_hidden(text: str, form: str) -> None:
    captured = Capture("json")
    try:
        raise ValueError(form.format(SECRET))
    except ValueError:
        captured.own.exception(
            "%s %s", text, form.format(SECRET), action=Action.JOB_REFUSED, job_id=form.format(SECRET)
        )
    captured.foreign.info(form.format(SECRET))
    assert SECRET not in captured.text
    ours, theirs = captured.records
    assert (
        "***" in ours["event"] and "***" in ours["exception"] and "***" in ours["job_id"] and "***" in theirs["event"]
    )


def test_the_console_line_is_for_people() -> None:
    captured = Capture("console")
    with logs.bound(job_id="j"):
        captured.own.warning("lost: %s", f"redis://:{SECRET}@h", action=Action.LEASE_LOST, shard=3)
    captured.foreign.info("plain")
    ours, theirs = captured.text.splitlines()
    name = captured.foreign.name
    assert ours.endswith(f" WARNING {name}: lost: redis://:***@h [action=lease.lost job_id=j shard=3]")
    assert theirs.endswith(f" INFO {name}: plain")


def test_other_handlers_get_an_ordinary_record(caplog: pytest.LogCaptureFixture) -> None:
    """Where a program has set up its own logging, only fields are added."""
    logs.get_logger("tests.program").warning("%d rows", 3, action=Action.JOB_DELETED, job_id="j")
    (record,) = caplog.records
    assert (record.getMessage(), record.name, vars(record)["action"], vars(record)["job_id"]) == (
        "3 rows",
        "tests.program",
        "job.deleted",
        "j",
    )


def test_set_up_leaves_a_program_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    root, handler = logging.getLogger(), logging.StreamHandler(io.StringIO())
    handler.setFormatter(logging.Formatter("mine: %(message)s"))
    monkeypatch.setattr(root, "handlers", [handler])
    logs.set_up("info", "json")
    assert handler.format(logging.LogRecord("x", 20, "", 0, f"redis://:{SECRET}@h", (), None)) == "mine: redis://:***@h"


def test_what_python_writes_is_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr("sys.excepthook", None)
    monkeypatch.setattr(threading, "excepthook", None)
    request.addfinalizer(lambda: logging.captureWarnings(False))
    logs.set_up("warning", "json")
    logging.getLogger("py.warnings").warning("DeprecationWarning: old")

    def broken() -> None:
        raise ValueError(SECRET[::-1])

    thread = threading.Thread(target=broken)
    thread.start()
    thread.join()
    warned, crashed = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert warned["event"] == "DeprecationWarning: old"
    assert (crashed["action"], crashed["level"]) == ("process.crashed", "critical")
    assert "ValueError" in crashed["exception"]
