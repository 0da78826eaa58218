"""What a command that runs as a service tells, where its log is JSON."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from pipeline.cli.command import Invocation


@pytest.mark.parametrize(
    ("level", "quiet", "told"),
    [("warning", False, ["serving"]), ("error", False, ["serving"]), ("info", False, ["serving"]), ("info", True, [])],
)
def test_a_services_notices_are_in_its_log_at_any_level(
    level: str,
    quiet: bool,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr("sys.excepthook", None)
    monkeypatch.setattr(threading, "excepthook", None)
    request.addfinalizer(lambda: logging.captureWarnings(False))
    for logger in (root, logging.getLogger("rowmill")):
        request.addfinalizer(lambda logger=logger, before=logger.level: logger.setLevel(before))
    invocation = Invocation(quiet=quiet, setting=["log_format=json", f"log_level={level}"])
    invocation.set_up_logging(service=True)
    invocation.notice("serving")
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(record["event"], record["action"]) for record in records] == [(text, "command.notice") for text in told]
