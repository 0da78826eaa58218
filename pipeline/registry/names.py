"""What a registered model is called: ``NAME``, ``NAME@2`` (a revision), ``NAME@prod`` (an alias). Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.models.resolve import FAKE
from storage.errors import InvalidJob

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_MOST_DIGITS = 9
_RESERVED = frozenset({"active", "latest", "newest", "previous"})


@dataclass(frozen=True, slots=True)
class Reference:
    """A model's name, and which of its revisions is meant: by number, by alias, or neither."""

    name: str
    number: int | None = None
    alias: str | None = None

    @property
    def is_name(self) -> bool:
        """Whether it says no revision."""
        return self.number is None and self.alias is None


def parse(text: str) -> Reference | None:
    """The reference that a text may be; ``None`` for what can only be a path: ``./NAME``, ``a/b``, ``a b``."""
    name, at, which = text.partition("@")
    if not _WORD.fullmatch(name) or name == FAKE:
        return None
    if not at:
        return Reference(name)
    if which.isascii() and which.isdigit():
        return Reference(name, number=int(which)) if len(which) <= _MOST_DIGITS else None
    return Reference(name, alias=which) if _WORD.fullmatch(which) else None


def required(text: str) -> Reference:
    """The same of a text that must be a reference. Raises :class:`InvalidJob`."""
    found = parse(text)
    if found is None:
        raise InvalidJob(
            f"{text!r} is no registered model; write NAME, NAME@2 (a revision) or NAME@alias", field="NAME"
        )
    return found


def check_name(name: str) -> None:
    """Raise :class:`InvalidJob` for what cannot be the name of a model."""
    if not _WORD.fullmatch(name) or name == FAKE:
        raise InvalidJob(
            f"a model's name has 1 to 128 letters, digits and _ . -, begins with a letter or digit, and is not "
            f"{FAKE!r}; not {name!r}",
            field="NAME",
        )


def check_alias(alias: str) -> None:
    """Raise :class:`InvalidJob` for what cannot be an alias: digits alone are a revision."""
    if not _WORD.fullmatch(alias) or alias.isdigit() or alias in _RESERVED:
        raise InvalidJob(
            f"an alias has 1 to 128 letters, digits and _ . -, is no number, and none of "
            f"{', '.join(sorted(_RESERVED))}; not {alias!r}",
            field="alias",
        )
