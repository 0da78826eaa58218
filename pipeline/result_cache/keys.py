"""What an answer depends on, as keys: pure.

A *namespace* is all that the rows of a job have in common (model, engine, parameters, shape of the result), and a *row
key* what a row adds to it (its tokens, its own parameters, its adapter). Equal keys mean equal answers: nothing that
changes an answer may be left out of both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 2
"""Raised when answers that were kept before may not be used any more."""


def namespace(facts: Mapping[str, Any]) -> str:
    """32 hex digits that name these facts, which are plain JSON. Raises ``TypeError`` or ``ValueError`` otherwise.

    The facts come in any order, what is inside them does not: a JSON Schema's properties are answered in its order.
    """
    text = json.dumps(dict(sorted({"format": FORMAT, **facts}.items())), allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def row_key(*parts: bytes) -> bytes:
    """32 bytes that name these parts, in this order. Where a part ends is part of it."""
    digest = hashlib.blake2b(digest_size=32, person=b"rowmill-row")
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
