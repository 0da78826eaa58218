"""What must not be shown: passwords in URLs, and values whose names say that they are secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_URL_PASSWORD = re.compile(r"([A-Za-z][\w+.-]*://[^\s:/@'\"]*:)[^\s'\"]*@")
_QUERY_SECRET = re.compile(r"(?i)([?&][^=&\s]*(?:pass|pwd|secret|token|key|sig)[^=&\s]*=)[^&\s'\"]+")
_SECRET_NAME = re.compile(r"(?i)key|secret|token|pass|pwd|credential|auth|sas|signature|connection_string|cookie")
HIDDEN = "***"


def redact_text(text: str) -> str:
    """The text with the passwords of URLs, and secret-looking query parameters, replaced by ``***``."""
    return _QUERY_SECRET.sub(rf"\1{HIDDEN}", _URL_PASSWORD.sub(rf"\1{HIDDEN}@", text))


def redact(value: object, name: str = "") -> Any:
    """The value as it may be shown: secrets replaced by ``***``, by their names and inside URLs.

    Everything below a name such as ``key``, ``token`` or ``credentials`` is hidden, except ``None``, ``""`` and
    booleans.
    """
    if value is None or value == "" or isinstance(value, bool):
        return value
    if name and _SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value
