"""Which messages are wake-ups: those that we send, and no others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from storage.broker import FINALIZE, PLAN, RUN, TICK, Wakeups
from tasks.messages import Malformed, check_envelope, check_task

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``Wakeups`` puts on a queue: the raw messages of Kombu's own virtual transport."""
    from kombu.transport.memory import Channel

    messages: list[dict[str, Any]] = []
    monkeypatch.setattr(Channel, "_put", lambda self, queue, message, **_: messages.append(message))
    wakeups = Wakeups("memory://")
    wakeups.plan()
    wakeups.run("onnx", 2)
    wakeups.finalize()
    wakeups.tick()
    return messages


def test_ours_are_taken(sent: list[dict[str, Any]]) -> None:
    assert [message["headers"]["task"] for message in sent] == [PLAN, RUN, RUN, FINALIZE, TICK]
    for message in sent:
        check_envelope(json.loads(json.dumps(message)))


def test_celery_by_hand_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from kombu.transport.memory import Channel

    messages: list[dict[str, Any]] = []
    monkeypatch.setattr(Channel, "_put", lambda self, queue, message, **_: messages.append(message))
    Celery(broker="memory://", set_as_current=False).send_task(RUN, args=["fake"], retry=False)
    check_envelope(json.loads(json.dumps(messages[0])))


@given(ANYTHING)
def test_anything_else_is_dropped_and_raises_nothing_else(value: Any) -> None:
    with pytest.raises(Malformed):
        check_envelope(value)


@given(st.tuples(ANYTHING, ANYTHING, ANYTHING, ANYTHING))
def test_whatever_a_transport_hands_over(parts: tuple[Any, ...]) -> None:
    with pytest.raises(Malformed):
        check_task(*parts)


@pytest.mark.parametrize("depth", [1, 2])
@given(data=st.data())
def test_a_message_with_one_thing_changed(depth: int, data: st.DataObject) -> None:
    """It is a wake-up or it is dropped; nothing else can come of it."""
    message: dict[str, Any] = {
        "body": "W1siZmFrZSJdLCB7fSwge31d",
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": RUN, "id": "1", "group": None, "eta": None, "timelimit": [None, None]},
        "properties": {"delivery_info": {}, "delivery_tag": "1", "body_encoding": "base64"},
    }
    place = message if depth == 1 else message[data.draw(st.sampled_from(["headers", "properties"]))]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(ANYTHING)
    try:
        check_envelope(message)
    except Malformed:
        return
    assert message["headers"]["task"] in (PLAN, RUN, FINALIZE, TICK)
    assert not message["headers"].get("eta")


@pytest.mark.parametrize(
    ("task", "body"),
    [
        (RUN, "[[], {}, {}]"),
        (RUN, "[[1], {}, {}]"),
        (RUN, '[["fake", "fake"], {}, {}]'),
        (RUN, '[["fake"], {"queue": "fake"}, {}]'),
        (RUN, '[["fake"], {}, {"chain": [{}]}]'),
        (PLAN, '[["fake"], {}, {}]'),
        ("rowmill.nothing", "[[], {}, {}]"),
        (PLAN, "[[], {}]"),
        (PLAN, "[" * 10_000),
        (PLAN, " " * 100_000 + "[[], {}, {}]"),
    ],
)
def test_calls_that_are_none(task: str, body: str) -> None:
    with pytest.raises(Malformed):
        check_task({"task": task, "id": "1"}, "application/json", "utf-8", body)
