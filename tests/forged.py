"""Messages on a queue that are no wake-ups of ours: nonsense, and calls that Celery would obey."""

from __future__ import annotations

import base64
import json
from typing import Any

from storage.broker import RUN


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def message(body: object = None, **more: Any) -> dict[str, Any]:
    """A wake-up as Celery writes it to Redis, and what is different in it."""
    headers = {"lang": "py", "task": RUN, "id": "1", "root_id": "1", "parent_id": None, "group": None}
    properties = {
        "correlation_id": "1",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": "fake"},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": "1",
    }
    own: dict[str, Any] = {
        "body": encoded('[["fake"], {}, {}]') if body is None else body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    return own | more


HEADERS, PROPERTIES = message()["headers"], message()["properties"]
FORGED: tuple[bytes | str, ...] = (
    "garbage",
    b"\xff\xfe\x00",
    "null",
    "[" * 100_000,
    json.dumps(message(7)),
    json.dumps(message("")),
    json.dumps(message("%%%")),
    json.dumps(message(encoded('"x"'))),
    json.dumps(message("A" * 10_000_000)),
    json.dumps(message(encoded("[" * 50_000))),
    json.dumps(message(headers=None)),
    json.dumps(message(properties={})),
    json.dumps(message(headers=HEADERS | {"task": "celery.backend_cleanup"})),
    json.dumps(message(headers=HEADERS | {"eta": "2999-01-01T00:00:00"})),
    json.dumps(message(headers=HEADERS | {"compression": "application/x-bz2"})),
    json.dumps(message(encoded('[[], {}, {"chain": [{"task": "rowmill.run", "args": ["fake"]}]}]'))),
    json.dumps(message(**{"content-type": "application/x-python-serialize"})),
)
