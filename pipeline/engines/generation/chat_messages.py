"""Conversations in a column: OpenAI's messages, as structs or as JSON text, with text or lists of parts in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from pipeline.engines.arrow_text import is_list, is_text
from pipeline.spec import json_text
from pipeline.spec.error_codes import RowErrorCode
from storage.errors import RowError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message may have; which of them a model's template knows is for the template to say."""
WANTED = (
    "messages are list<struct<role: string, content: string>>, or text that holds them as JSON: "
    '[{"role": "user", "content": "…"}]'
)


def is_conversation(kind: pa.DataType) -> bool:
    """True for lists of messages, and for text (``arrow.json`` too) that may hold them as JSON."""
    if isinstance(kind, pa.DictionaryType):
        return is_conversation(kind.value_type)
    return is_text(kind) or isinstance(kind, pa.JsonType) or _has(kind, "role", "content")


def _has(kind: Any, name: str, content: str) -> bool:
    """Whether it is a list of structs with two such fields: text, and text or a list of parts."""
    if not is_list(kind):
        return False
    item = kind.value_type
    fields = {field.name: field.type for field in item} if pa.types.is_struct(item) else {}
    if not {name, content} <= fields.keys() or not is_text(fields[name]):
        return False
    return is_text(fields[content]) or (content == "content" and _has(fields[content], "type", "text"))


def text_of(message: Mapping[str, Any]) -> str:
    """What a parsed message says, its parts line by line."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """The messages of one row of a chat column: a list of mappings, or JSON text of one. Raises :class:`RowError`."""
    if isinstance(value, str):
        try:
            value = json_text.loads(value)
        except ValueError as error:
            raise RowError(RowErrorCode.INVALID_VALUE, f"the messages are not JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise RowError(RowErrorCode.INVALID_VALUE, "the messages must be a list of at least one message")
    return [_message(index, message) for index, message in enumerate(value)]


def _message(index: int, message: Any) -> dict[str, Any]:
    def refuse(why: str) -> RowError:
        return RowError(RowErrorCode.INVALID_VALUE, f"message {index}: {why}")

    if not isinstance(message, Mapping):
        raise refuse("must be an object with role and content")
    # Every struct of an Arrow column has all the fields; those that are null are simply not there.
    found = {name: item for name, item in message.items() if item is not None}
    role, content = found.get("role"), found.get("content")
    if role not in ROLES:
        raise refuse(f"role must be one of {', '.join(ROLES)}, not {role!r}")
    if isinstance(content, list):
        # Anything else in a part may name a file or an address to fetch, which a row must not make this machine do:
        # vLLM looks for its kind by every key that it has, whatever ``type`` says.
        found["content"] = [_text_part(part, refuse) for part in content]
    elif not isinstance(content, str) and not (content is None and found.get("tool_calls")):
        raise refuse("content must be text")
    return found


def _text_part(part: Any, refuse: Callable[[str], RowError]) -> dict[str, str]:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise refuse("content parts other than text are not supported")
    more = sorted(str(name) for name, item in part.items() if item is not None and name not in ("type", "text"))
    if more:
        raise refuse(f"a content part of text has type and text, and nothing else; this one has {', '.join(more)}")
    return {"type": "text", "text": part["text"]}
