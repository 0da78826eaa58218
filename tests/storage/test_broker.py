"""Wake-ups: a broker that does not answer may delay work, and never stops whoever sends."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from storage import broker
from storage.broker import Wakeups
from storage.errors import Unreachable


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Redis that takes connections and never answers; nobody waits longer than 0.2 s for it."""
    monkeypatch.setattr(broker, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(broker, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@pytest.mark.timeout(60)
def test_a_broker_that_never_answers_is_given_up(silent: str, caplog: pytest.LogCaptureFixture) -> None:
    wakeups = Wakeups(silent)
    wakeups.plan()
    assert "the broker does not answer" in caplog.text
    caplog.clear()
    wakeups.plan()
    assert not caplog.text, "it is left alone for a while"


@pytest.mark.timeout(60)
def test_a_check_of_it_ends(silent: str) -> None:
    with pytest.raises(Unreachable):
        Wakeups(silent).check()
