"""Variables that are set while processes are started: by one thread at a time, and gone afterwards."""

from __future__ import annotations

import os
import threading

import pytest

from pipeline.engines.environ import holding

NAME, KEPT = "_ROWMILL_TEST_NEW", "_ROWMILL_TEST_KEPT"
PATIENCE = 0.3
"""Seconds in which a thread that nothing holds back is far inside."""


def test_they_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEPT, "before")
    with pytest.raises(ZeroDivisionError), holding({NAME: "1", KEPT: "meanwhile"}):
        assert (os.environ[NAME], os.environ[KEPT]) == ("1", "meanwhile")
        with holding({NAME: "2"}):  # the same thread may hold more
            assert (os.environ[NAME], os.environ[KEPT]) == ("2", "meanwhile")
        assert os.environ[NAME] == "1"
        raise ZeroDivisionError
    assert NAME not in os.environ
    assert os.environ[KEPT] == "before"


def test_no_thread_is_given_what_another_holds() -> None:
    inside, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        with holding({NAME: "other"}):
            seen.append(os.environ[NAME])
            inside.set()
            go_on.wait()

    thread = threading.Thread(target=other)
    with holding({NAME: "ours"}):
        thread.start()
        assert not inside.wait(PATIENCE)
        assert os.environ[NAME] == "ours"
    assert inside.wait(60)
    go_on.set()
    thread.join(60)
    assert seen == ["other"]
    assert NAME not in os.environ
