"""Prompt templates: ``{column}`` becomes the row's value, ``{{`` and ``}}`` are braces, and nothing else happens.

Deliberately not :meth:`str.format`: attribute access, indexing, conversions and format specs would let a template read
what is not a column, or pad a prompt to gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Template:
    """A parsed template. ``fields`` are the columns it reads, each once, in order of appearance.

    Raises ``ValueError`` for an unbalanced brace or an empty field.
    """

    def __init__(self, text: str) -> None:
        literals, names, at = [], [], 0
        buffer = ""
        for match in _TOKEN.finditer(text):
            buffer += text[at : match.start()]
            at = match.end()
            token = match[0]
            if token in ("{{", "}}"):
                buffer += token[0]
            elif match[1] is None:
                raise ValueError(f"unbalanced {token!r} at character {match.start()}; write {token * 2!r} for a brace")
            elif not match[1].strip():
                raise ValueError(f"empty field at character {match.start()}; name a column, as in {{text}}")
            else:
                literals.append(buffer)
                names.append(match[1])
                buffer = ""
        literals.append(buffer + text[at:])
        self.text = text
        self._literals: Sequence[str] = literals
        self._names: Sequence[str] = names
        self.fields: tuple[str, ...] = tuple(dict.fromkeys(names))

    @property
    def is_one_field(self) -> bool:
        """Whether the prompt is a column's text, and nothing else."""
        return len(self._names) == 1 and not any(self._literals)

    def render(self, row: Mapping[str, str]) -> str:
        """The prompt of one row: column → its text (see :mod:`pipeline.engines.rendering`). A missing key raises
        ``KeyError``."""
        out = [self._literals[0]]
        for name, literal in zip(self._names, self._literals[1:], strict=True):
            out.append(row[name])
            out.append(literal)
        return "".join(out)
