"""Structured output: what a job may ask for, and whether an answer keeps to it.

The shape of ``sampling.structured_outputs`` is that of vLLM's ``StructuredOutputsParams``. vLLM lets the model write
nothing else while it generates; what can break the result is the end of the tokens, a stop string, or a keyword of the
schema that its grammar does not express. So every answer is looked at again, here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from jsonschema import SchemaError, ValidationError
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from pipeline.engines.value_checks import FLAG, TEXT, TEXTS, Check, refuse_wrong, unknown_name
from storage.errors import InvalidJob

FIELD = "sampling.structured_outputs"
LONGEST_REASON = 300
"""Characters of a validator's message that are passed on; it repeats the value."""

_SCHEMA: Check = ("a JSON Schema", lambda value: isinstance(value, (str, dict)))
KINDS: Mapping[str, Check] = MappingProxyType(
    {
        "json": _SCHEMA,
        "regex": TEXT,
        "choice": TEXTS,
        "grammar": TEXT,
        "json_object": ("true", lambda value: value is True),
        "structural_tag": TEXT,
    }
)
"""Of these, exactly one is given."""
MANNERS: Mapping[str, Check] = MappingProxyType(
    {"disable_any_whitespace": FLAG, "disable_additional_properties": FLAG, "whitespace_pattern": TEXT}
)
"""What may stand beside it."""


def check(given: Mapping[str, Any], field: str = FIELD) -> None:
    """Raise :class:`InvalidJob` for what is no ``StructuredOutputsParams``, or no JSON Schema."""
    known = {**KINDS, **MANNERS}
    for name, value in given.items():
        if name not in known:
            raise InvalidJob(unknown_name("structured output parameters", name, known), field=f"{field}.{name}")
        if value is not None:
            refuse_wrong(f"{field}.{name}", known[name], value)
    kinds = [name for name in KINDS if given.get(name) is not None]
    if len(kinds) != 1:
        names = " and ".join(kinds) or "none"
        raise InvalidJob(f"needs exactly one of {', '.join(KINDS)}, not {names}", field=field)
    if given.get("choice") == []:
        raise InvalidJob("must name at least one choice", field=f"{field}.choice")
    if kinds == ["json"]:
        schema_of(given["json"], f"{field}.json")


def schema_of(given: Any, field: str) -> dict[str, Any]:
    """The JSON Schema, which may be given as text. Raises :class:`InvalidJob` when it is none."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise InvalidJob(f"is not JSON: {error}", field=field) from None
    if not isinstance(given, dict):
        raise InvalidJob(f"must be a JSON object, not {given!r}", field=field)
    try:
        validator_for(given, Draft202012Validator).check_schema(given)
    except SchemaError as error:
        where = "".join(f"[{part!r}]" for part in error.absolute_path)
        reason = error.message[:LONGEST_REASON]
        raise InvalidJob(f"is no JSON Schema: {where and where + ': '}{reason}", field=field) from None
    except RecursionError:
        raise InvalidJob("is nested too deeply", field=field) from None
    _refuse_references_to_elsewhere(given, field)
    return given


def _refuse_references_to_elsewhere(schema: dict[str, Any], field: str) -> None:
    # Nothing is fetched, here or by vLLM, which would let the model write anything in its place.
    resolver = Registry().resolver_with_root(Resource.from_contents(schema, default_specification=DRAFT202012))
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise InvalidJob(f"refers to {reference!r}, which it does not hold itself", field=field) from None


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for name, below in part.items():
            if name not in ("const", "default", "enum", "examples"):
                yield from _references(below)
    elif isinstance(part, list):
        for below in part:
            yield from _references(below)


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
        return _Json(schema_of(given["json"], FIELD))
    if given.get("json_object") is not None:
        return _Json({"type": "object"})
    if given.get("choice") is not None:
        return _Choice(frozenset(given["choice"]))
    kind = next(name for name in KINDS if given.get(name) is not None)
    return _Grammar(kind, given[kind])


class _Json:
    def __init__(self, schema: dict[str, Any]) -> None:
        # With a registry of its own, no reference is fetched from anywhere.
        self._validator = validator_for(schema, Draft202012Validator)(schema, registry=Registry())

    def broken(self, text: str, *, ended: bool) -> str | None:
        cut = "" if ended else "it was cut off: "
        try:
            value = json.loads(text, parse_constant=_no_constant)
            self._validator.validate(value)
        except ValidationError as error:
            return f"the output breaks the schema at {error.json_path}: {error.message[:LONGEST_REASON]}"
        except (ValueError, RecursionError) as error:
            return f"the output is not JSON: {cut}{error}"
        return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _Choice:
    def __init__(self, choices: frozenset[str]) -> None:
        self._choices = choices

    def broken(self, text: str, *, ended: bool) -> str | None:
        return None if text in self._choices else f"the output {text[:LONGEST_REASON]!r} is none of the choices"


class _Grammar:
    """A regex, grammar or structural tag: what the model ended was held to it to the last token.

    What was cut may be complete all the same: that is for vLLM's default matcher to say, where it knows the form.
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
        return bool((text == "" or matcher.accept_string(text)) and matcher.is_terminated())

    @functools.cached_property
    def _compiled(self) -> Any:
        if self._kind == "structural_tag":
            return None
        try:
            import xgrammar

            read = xgrammar.Grammar.from_regex if self._kind == "regex" else xgrammar.Grammar.from_ebnf
            # The text is matched by its bytes; no token of the model comes into it.
            return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(["a"])).compile_grammar(read(self._source))
        except (ImportError, RuntimeError, ValueError):  # another backend's dialect
            return None
