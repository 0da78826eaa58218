"""What a value in a job may be, in words and as a test, and the tables of options that say it, one line for each."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import InvalidJob

MOST = 2**63 - 1
"""The largest whole number that crosses to an engine: they are 64 bits wide there."""

Check = tuple[str, Callable[[Any], bool]]
"""What the value must be, in words, and the test."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -MOST <= value <= MOST


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_token(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_list(value: Any, of: Callable[[Any], bool], least: int = 0) -> bool:
    return isinstance(value, (list, tuple)) and len(value) >= least and all(map(of, value))


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        (_is_int(token) or (isinstance(token, str) and token.isdecimal())) and _is_number(bias)
        for token, bias in value.items()
    )


INT: Check = ("a whole number", _is_int)
FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
TEXT: Check = ("text", lambda value: isinstance(value, str))
MAPPING: Check = ("a mapping", lambda value: isinstance(value, Mapping))
TYPES: Mapping[str, Check] = {
    "integer": INT,
    "number": ("a number", _is_number),
    "flag": FLAG,
    "text": TEXT,
    "texts": ("a list of non-empty texts", lambda value: _is_list(value, _is_word)),
    "text_or_texts": (
        "non-empty text or a list of it",
        lambda value: _is_word(value) or _is_list(value, _is_word),
    ),
    "token_ids": ("a list of token ids", lambda value: _is_list(value, _is_token)),
    "some_token_ids": ("a list of at least one token id", lambda value: _is_list(value, _is_token, 1)),
    "token_bias": ("a mapping of token ids to numbers", _is_bias),
    "mapping": MAPPING,
    "schema": ("a JSON Schema", lambda value: isinstance(value, (str, dict))),
    "true": ("true", lambda value: value is True),
    "length": ('a whole number of at least 1, -1 or "auto"', lambda v: (_is_int(v) and v >= 1) or v in (-1, "auto")),
    "plain": (
        "text, a number, true, false or null",
        lambda value: value is None or isinstance(value, (str, bool)) or _is_number(value),
    ),
}
"""By their names in the tables."""


def at_least(least: int) -> Check:
    """Whole numbers from ``least``."""
    return _check_of({"type": "integer", "min": least})


def _check_of(entry: Mapping[str, Any]) -> Check:
    """What an entry of a table says of its value: ``type`` with ``min``, ``above`` and ``max``, or ``choices``; with
    ``null``, also null."""
    if (choices := entry.get("choices")) is not None:
        choices = [*choices, *([None] if entry.get("null") else [])]
        words = f"one of {', '.join(map(str, choices))}"
        return words, lambda value: any(type(value) is type(one) and value == one for one in choices)
    words, is_one = TYPES[entry["type"]]
    least, above, most = (entry.get(name) for name in ("min", "above", "max"))
    if above is not None:
        words += f" above {above}" + ("" if most is None else f" and at most {most}")
    elif least is not None:
        words += f" of at least {least}" if most is None else f" from {least} to {most}"

    def test(value: Any) -> bool:
        return is_one(value) and not (
            (least is not None and value < least)
            or (above is not None and value <= above)
            or (most is not None and value > most)
        )

    if entry.get("null"):
        return f"{words}, or null", lambda value: value is None or test(value)
    return words, test


class OptionTable:
    """Options by name, from one section of a TOML file: what each may hold; why some are ``refused``; ``unknown``:
    those that are not there after all. ``kind`` names the options in messages."""

    def __init__(self, file: Path, section: str, kind: str) -> None:
        self.entries: Mapping[str, Mapping[str, Any]] = tomllib.loads(file.read_text(encoding="utf-8"))[section]
        self._kind = kind
        self._checks = {
            name: _check_of(entry) for name, entry in self.entries.items() if {"type", "choices"} & entry.keys()
        }

    def having(self, key: str) -> dict[str, Any]:
        """What stands under ``key``, by the names of the options that have it."""
        return {name: entry[key] for name, entry in self.entries.items() if key in entry}

    @property
    def settable(self) -> list[str]:
        """The options that a job may set."""
        return [name for name, entry in self.entries.items() if not {"refused", "unknown"} & entry.keys()]

    def check(self, name: Any, value: Any, field: str) -> None:
        """Raise :class:`~storage.errors.InvalidJob` for an option that is not there or not a job's to set, and for a
        value that it cannot take."""
        entry = self.entries.get(name, {"unknown": True})
        if "refused" in entry:
            raise InvalidJob(f"not a job's to set: {entry['refused']}", field=field)
        if "unknown" in entry:
            raise InvalidJob(unknown_name(self._kind, str(name), self.settable), field=field)
        if name in self._checks:
            refuse_wrong(field, self._checks[name], value)


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
