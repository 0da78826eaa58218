"""What the fields of a user's request may hold: text that can be stored, numbers of 64 bits, plain JSON. Pure.

Rules made by :func:`rule` hold for requests. A request that is stored already is read without them: it may have been
accepted by an earlier version, and its job must be able to end.
"""

from __future__ import annotations

import math
import operator
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo

from pipeline.spec.json_text import MAX_DEPTH, TooDeep
from storage.errors import InvalidJob

T = TypeVar("T")

STORED = {"stored": True}
"""The pydantic context under which a request is read back from the database."""
MOST = 2**63 - 1
SHORTEST_ROW_SECONDS, LONGEST_ROW_SECONDS = 0.001, 7 * 86400.0
MOST_ITEMS = 2**31 - 1
"""The longest list in a row of an Arrow table, whose offsets have 32 bits."""


def rule(check: Callable[[T], object]) -> AfterValidator:
    """A validator that calls ``check``, which raises ``ValueError``, for every value that is not read back."""

    def validate(value: T, info: ValidationInfo) -> T:
        if not (info.context or {}).get("stored"):
            check(value)
        return value

    return AfterValidator(validate)


def unicode_text(text: str) -> None:
    """Raise ``ValueError`` for half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_shown(text)} is not Unicode text at character {error.start}; write it in UTF-8") from None


def plain_text(text: str) -> None:
    """Raise ``ValueError`` for what :func:`unicode_text` refuses, and for a NUL, which no path and no key may hold."""
    unicode_text(text)
    if "\0" in text:
        raise ValueError(f"{_shown(text)} holds a NUL character; remove it")


def not_blank(text: str) -> None:
    """Raise ``ValueError`` for text without a visible character."""
    if not text.strip():
        raise ValueError(f"{text!r} is blank; leave the field out, or put something into it")


def all_different(names: Sequence[str]) -> None:
    """Raise ``ValueError`` when a name occurs twice."""
    twice = sorted(name for name, n in Counter(names).items() if n > 1)
    if twice:
        raise ValueError(f"{', '.join(map(repr, twice))} is named twice; name it once")


def _whole(value: Any) -> Any:
    """Whole numbers of any library (NumPy's are no ``int``), but not true and false; the type checks the rest."""
    if isinstance(value, bool):
        raise ValueError(f"must be a whole number, not {value}")  # noqa: TRY004 - pydantic knows this one
    try:
        return operator.index(value)
    except TypeError:
        return value


def _number(value: Any) -> Any:
    """Whatever the type takes for a number, but not true and false, which Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")  # noqa: TRY004 - pydantic knows this one
    return value


def a_time_for_a_row(seconds: float) -> None:
    """Raise ``ValueError`` for a limit that no row could keep, or that none could reach."""
    if not SHORTEST_ROW_SECONDS <= seconds <= LONGEST_ROW_SECONDS:
        least, most = SHORTEST_ROW_SECONDS, LONGEST_ROW_SECONDS
        raise ValueError(
            f"{seconds:g} seconds is no time limit for a row; give {least:g} to {most:.0f} (a week), or leave it out "
            "for no limit"
        )


AnyText = Annotated[str, rule(unicode_text)]
"""Text for a model."""
Text = Annotated[str, rule(plain_text)]
"""Paths, keys and words of our own."""
Filled = Annotated[Text, rule(not_blank)]
"""Text that says something."""
Prompt = Annotated[AnyText, rule(not_blank)]
Name = Annotated[AnyText, Field(min_length=1)]
"""A column or an input of a graph: names of others, which may hold blanks, and even a NUL."""
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=-MOST - 1, le=MOST)]
"""A whole number of 64 bits."""
NUMBER = BeforeValidator(_number)
"""For a ``float`` that is given as a number."""
RowSeconds = Annotated[float, NUMBER, rule(a_time_for_a_row)]
"""Seconds that one row may take."""


def plain_json(value: Any) -> None:
    """Raise ``ValueError``, naming the place, unless the value is JSON that every reader of it understands alike.

    Numbers are finite and whole ones have 64 bits; text is Unicode; keys are text, or whole numbers (token ids), which
    JSON writes as text; at most ``MAX_DEPTH`` levels are nested.
    """
    _check_json(value, unicode_text)


def plain_options(value: Any) -> None:
    """:func:`plain_json` for options, which name files: no text in them holds a NUL."""
    _check_json(value, plain_text)


def _check_json(value: Any, check_text: Callable[[str], None]) -> None:
    waiting: list[tuple[Any, str, int]] = [(value, "", 0)]
    while waiting:
        item, where, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise TooDeep
        try:
            below = _checked(item, where, check_text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}" if where else str(error)) from None
        waiting += [(inner, name, depth + 1) for inner, name in below]


def _checked(item: Any, where: str, check_text: Callable[[str], None]) -> list[tuple[Any, str]]:
    """What is in the item, each with the name of its place."""
    match item:
        case None | bool():
            return []
        case str():
            check_text(item)
            return []
        case int():
            if not -MOST - 1 <= item <= MOST:
                raise ValueError("a whole number beyond 64 bits; write it as text")
            return []
        case float():
            if not math.isfinite(item):
                raise ValueError(f"must be plain JSON, which has no {item}")
            return []
        case Mapping():
            for key in item:
                if isinstance(key, str):
                    check_text(key)
                elif not isinstance(key, int) or isinstance(key, bool):
                    raise ValueError(f"must be plain JSON, whose keys are text, not {key!r}")  # noqa: TRY004
            return [(inner, f"{where}.{key}".lstrip(".")) for key, inner in item.items()]
        case list() | tuple():
            return [(inner, f"{where}[{at}]") for at, inner in enumerate(item)]
        case _:
            raise ValueError(f"must be plain JSON, not {type(item).__name__}")


def _shown(text: str) -> str:
    whole = repr(text)
    return whole if len(whole) <= 100 else whole[:99] + "…"


_SAY_ENOUGH = ("extra_forbidden", "missing", "value_error")


def invalid(error: ValidationError) -> InvalidJob:
    """What pydantic found, as the error that names every field at fault and why."""
    problems = []
    found_in = {item["loc"][0] for item in error.errors(include_url=False) if len(item["loc"]) > 1}
    for item in error.errors(include_url=False):
        if item["type"] == "too_short" and len(item["loc"]) == 1 and item["loc"][0] in found_in:
            continue  # pydantic counts only what is right in a list, and says so twice
        where = ".".join(_printable(str(part)) for part in item["loc"] if part != "[key]")
        what = item["msg"].removeprefix("Value error, ")
        if item["type"] not in _SAY_ENOUGH and isinstance(item["input"], (str, int, float)):
            what += f", not {textwrap.shorten(repr(item['input']), 100)}"
        problems.append((where, "unknown field" if item["type"] == "extra_forbidden" else what))
    first = problems[0][0] or None
    if len(problems) == 1:
        return InvalidJob(problems[0][1], field=first)
    found = InvalidJob("; ".join(f"{where}: {what}" if where else what for where, what in problems))
    found.field = first
    return found


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]
