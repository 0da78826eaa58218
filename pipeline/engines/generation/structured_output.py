"""Structured output: what a job may ask for, and whether an answer keeps to it.

The shape of ``sampling.structured_outputs`` is that of vLLM's ``StructuredOutputsParams``. vLLM lets the model write
nothing else while it generates; what can break the result is the end of the tokens, a stop string, or a keyword of the
schema that its grammar does not express. So every answer is looked at again, here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

from pipeline.engines.generation import json_schema
from pipeline.engines.generation.json_schema import LONGEST_REASON
from pipeline.engines.generation.validators import OptionTable
from storage.errors import InvalidJob

FIELD = "sampling.structured_outputs"
_BYTES = 256
TABLE = OptionTable(Path(__file__).with_name("sampling.toml"), "structured_outputs", "structured output parameters")
KINDS = tuple(TABLE.having("constraint"))
"""Of these, exactly one is given."""


def check(given: Mapping[str, Any], field: str = FIELD) -> None:
    """Raise :class:`InvalidJob` for what is no ``StructuredOutputsParams``, or no JSON Schema."""
    for name, value in given.items():
        TABLE.check(name, value, f"{field}.{name}")
    kinds = [name for name in KINDS if given.get(name) is not None]
    if len(kinds) != 1:
        names = " and ".join(kinds) or "none"
        raise InvalidJob(f"needs exactly one of {', '.join(KINDS)}, not {names}", field=field)
    if given.get("choice") == []:
        raise InvalidJob("must name at least one choice", field=f"{field}.choice")
    if kinds == ["json"]:
        json_schema.parsed(given["json"], f"{field}.json")


class Form(Protocol):
    """What an answer has to be."""

    def broken(self, text: str, *, ended: bool) -> str | None:
        """Why the text is not of this form, or ``None``. ``ended``: the model ended it, rather than a limit."""
        ...


def form(given: Mapping[str, Any] | None) -> Form | None:
    """The form that ``sampling.structured_outputs`` (checked) asks for, or ``None``."""
    if not given:
        return None
    if given.get("json") is not None:
        return _Json(json_schema.parsed(given["json"], FIELD))
    if given.get("json_object") is not None:
        return _Json({"type": "object"})
    if given.get("choice") is not None:
        return _Choice(frozenset(given["choice"]))
    kind = next(name for name in KINDS if given.get(name) is not None)
    return _Grammar(kind, given[kind])


class _Json:
    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = json_schema.Schema(schema)

    def broken(self, text: str, *, ended: bool) -> str | None:
        cut = "" if ended else "it was cut off: "
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            return f"the output is not JSON: {cut}{error}"
        if not ended and isinstance(value, (int, float)) and not isinstance(value, bool):
            return f"the output was cut off: {text[:LONGEST_REASON]!r} may be the beginning of a longer number"
        return self._schema.broken(value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _Choice:
    def __init__(self, choices: frozenset[str]) -> None:
        self._choices = choices

    def broken(self, text: str, *, ended: bool) -> str | None:
        if text not in self._choices:
            return f"the output {text[:LONGEST_REASON]!r} is none of the choices"
        if not ended and any(choice != text and choice.startswith(text) for choice in self._choices):
            return f"the output was cut off: {text[:LONGEST_REASON]!r} is the beginning of another choice, too"
        return None


class _Grammar:
    """A regex, grammar or structural tag: what the model ended was held to it to the last token.

    What was cut may be complete all the same, if nothing could follow: that is for vLLM's default matcher to say,
    where it knows the form.
    """

    def __init__(self, kind: str, source: str) -> None:
        self._kind, self._source = kind, source

    def broken(self, text: str, *, ended: bool) -> str | None:
        if ended or self._complete(text):
            return None
        return f"the output was cut off before it matched the {self._kind.replace('_', ' ')}"

    def _complete(self, text: str) -> bool:
        compiled = self._compiled
        if compiled is None:
            return False
        import xgrammar

        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        if not (text == "" or matcher.accept_string(text)) or not matcher.is_terminated():
            return False
        following = xgrammar.allocate_token_bitmask(1, _BYTES)
        matcher.fill_next_token_bitmask(following)
        return not bool(following.any())

    @functools.cached_property
    def _compiled(self) -> Any:
        if self._kind == "structural_tag":
            return None
        try:
            import xgrammar

            read = xgrammar.Grammar.from_regex if self._kind == "regex" else xgrammar.Grammar.from_ebnf
            # The text is matched by its bytes, which are the tokens: none of the model's comes into it.
            every = xgrammar.TokenizerInfo([bytes([value]) for value in range(_BYTES)])
            return xgrammar.GrammarCompiler(every).compile_grammar(read(self._source))
        except (ImportError, RuntimeError, ValueError):  # another backend's dialect
            return None
