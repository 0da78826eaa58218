"""Which messages are wake-ups of ours. All others are dropped: a message may wake a worker, and do nothing else to it.

Pure: no broker, no Celery. What is not checked here is not read by us either.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from storage.broker import FINALIZE, PLAN, RUN, TICK

LONGEST = 64 * 1024
"""Characters of a message. Ours have about a thousand."""
_ARGUMENTS: dict[str, tuple[type, ...]] = {PLAN: (), RUN: (str,), FINALIZE: (), TICK: ()}
_NOT_OURS = ("eta", "expires", "group", "compression")
"""Headers that would have Celery keep a message for later, or unpack it. Ours leave them empty."""


class Malformed(Exception):
    """The message is dropped for this reason."""


def check_envelope(message: object) -> None:
    """What Kombu's Redis transport has decoded: JSON with everything that Kombu reads. Raises :class:`Malformed`."""
    if not isinstance(message, dict):
        raise Malformed(f"a JSON object is expected, not {type(message).__name__}")
    properties, body = message.get("properties"), message.get("body")
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_info"), dict):
        raise Malformed("it has no properties")
    if not isinstance(properties.get("delivery_tag"), str):
        raise Malformed("it has no delivery tag")
    if not isinstance(body, str) or len(body) > LONGEST:
        raise Malformed("its body is not text, or too long")
    if properties.get("body_encoding") != "base64":
        raise Malformed("its body is not encoded in base64")
    try:
        text = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("its body is not base64") from None
    check_task(message.get("headers"), message.get("content-type"), message.get("content-encoding"), text)


def check_task(headers: object, content_type: object, content_encoding: object, body: object) -> None:
    """A call of one of our tasks, in Celery's second protocol. Raises :class:`Malformed`."""
    if not isinstance(headers, Mapping):
        raise Malformed("it has no headers")
    task = headers.get("task")
    if not isinstance(task, str) or task not in _ARGUMENTS:
        raise Malformed("it calls no task of ours")
    if not isinstance(headers.get("id"), str):
        raise Malformed("it has no id")
    for name in _NOT_OURS:
        if headers.get(name):
            raise Malformed(f"its header {name!r} is not empty")
    if headers.get("timelimit") not in (None, [None, None], (None, None)):
        raise Malformed("its header 'timelimit' is not empty")
    if content_type != "application/json" or content_encoding != "utf-8":
        raise Malformed("it is not JSON in UTF-8")
    arguments, keywords, embedded = _body(body)
    kinds = _ARGUMENTS[task]
    if keywords or len(arguments) != len(kinds) or not all(map(isinstance, arguments, kinds)):
        raise Malformed(f"its arguments are not those of {task}")
    if any(embedded.values()):
        raise Malformed("it names tasks to call afterwards")


def _body(body: object) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    if not isinstance(body, (str, bytes)) or len(body) > LONGEST:
        raise Malformed("its body is not text, or too long")
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError):
        raise Malformed("its body is not JSON") from None
    match decoded:
        case [list() as arguments, dict() as keywords, dict() as embedded]:
            return arguments, keywords, embedded
    raise Malformed("its body is not a list of arguments, keywords and embedded tasks")
