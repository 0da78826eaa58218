"""Text that every database and every file format can hold. Pure.

PostgreSQL refuses a NUL in text and in JSONB, no database takes half of a surrogate pair, and JSON has no number that
is not finite. Text of users and of engines (a URI, a message, a name) may hold all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def storable(text: str) -> str:
    r"""``text`` with each NUL as ``\x00`` and each half of a surrogate pair as ``\udc80``, for instance."""
    if text.isascii():
        return text.replace("\0", r"\x00") if "\0" in text else text
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode(errors="backslashreplace").decode()
    return text.replace("\0", r"\x00")


def storable_json(value: Any) -> Any:
    """A value for a JSON column: all text in it, keys included, is :func:`storable`; NaN and infinities are text."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {storable(key) if isinstance(key, str) else key: storable_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable_json(item) for item in value]
    return value
