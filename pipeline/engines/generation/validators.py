"""What a value in a job may be, in words and as a test: the parts that option tables are made of."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from storage.errors import InvalidJob

MOST = 2**63 - 1
"""The largest whole number that crosses to an engine: they are 64 bits wide there."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -MOST <= value <= MOST


def is_number(value: Any) -> bool:
    """A finite number, whole ones of 64 bits at most."""
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(test(item) for item in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


Check = tuple[str, Callable[[Any], bool]]
"""What the value must be, in words, and the test."""

INT: Check = ("a whole number", _is_int)
NUMBER: Check = ("a number", is_number)
FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
TEXT: Check = ("text", _is_text)
TEXTS: Check = ("a list of non-empty texts", _list_of(lambda item: isinstance(item, str) and item != ""))
TEXT_OR_TEXTS: Check = (
    "non-empty text or a list of it",
    lambda value: (isinstance(value, str) and value != "") or TEXTS[1](value),
)
TOKEN_IDS: Check = ("a list of token ids", _list_of(lambda item: _is_int(item) and item >= 0))
MAPPING: Check = ("a mapping", lambda value: isinstance(value, Mapping))
TOKEN_BIAS: Check = (
    "a mapping of token ids to numbers",
    lambda value: (
        isinstance(value, Mapping)
        and all((_is_int(k) or (isinstance(k, str) and k.isdecimal())) and is_number(v) for k, v in value.items())
    ),
)


def at_least(least: int, kind: Check = INT) -> Check:
    return f"{kind[0]} of at least {least}", lambda value: kind[1](value) and value >= least


def within(words: str, test: Callable[[float], bool]) -> Check:
    return f"a number {words}", lambda value: is_number(value) and test(value)


def or_none(check: Check) -> Check:
    return f"{check[0]}, or null", lambda value: value is None or check[1](value)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"see vLLM's {kind}"
    return f"vLLM has no such {kind.removesuffix('s')}; {hint}"


def refuse_wrong(field: str, check: Check, value: Any) -> None:
    words, test = check
    if isinstance(value, int) and not -MOST <= value <= MOST:
        raise InvalidJob(f"must be {words}, of at most 64 bits", field=field)
    if not test(value):
        raise InvalidJob(f"must be {words}, not {value!r}", field=field)
