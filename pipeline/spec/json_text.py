"""JSON of users and of models, read in one place: whatever is wrong with it is a ``ValueError``. Pure.

Values that are nested deeper than :data:`MAX_DEPTH` are refused. Python, pydantic, pyarrow and the engines each have a
limit of their own, and break in their own way beyond it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, NoReturn

MAX_DEPTH = 100
"""Lists and objects inside each other, the outermost counted as one."""


class TooDeep(ValueError):
    """The value is nested deeper than :data:`MAX_DEPTH`."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {MAX_DEPTH} levels deep")


def loads(text: str | bytes, *, constants: bool = True) -> Any:
    """The value of a JSON document; ``NaN`` and ``Infinity`` are no JSON unless ``constants``.

    Raises ``ValueError``: not JSON, not UTF-8, :class:`TooDeep`.
    """
    try:
        value = json.loads(text) if constants else json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise TooDeep from None
    check_depth(value)
    return value


def loads_toml(text: str) -> dict[str, Any]:
    """The table of a TOML document. Raises ``ValueError`` as :func:`loads` does."""
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise TooDeep from None
    check_depth(value)
    return value


def check_depth(value: object) -> None:
    """Raise :class:`TooDeep` for a value that is nested too deeply, whoever made it."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for item in level for inner in _children(item)]
        if not level:
            return
    raise TooDeep


def check_text(value: object) -> None:
    """Raise ``ValueError`` for text in ``value``, keys included, that UTF-8 cannot hold: half of a surrogate pair.

    Python makes such text of file names and arguments that are not UTF-8. ``value`` is not nested too deeply.
    """
    level: list[object] = [value]
    while level:
        for item in level:
            if isinstance(item, (str, PurePath)):
                _check_utf8(str(item))
            elif isinstance(item, Mapping):
                for key in item:
                    if isinstance(key, str):
                        _check_utf8(key)
        level = [inner for item in level for inner in _children(item)]


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="backslashreplace").decode()
        raise ValueError(f"'{shown[:200]}' is not valid UTF-8; rename it, or write it as UTF-8") from None


def _children(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
