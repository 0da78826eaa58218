"""JSON Schemas that come with a job or a row: whether they are one, and whether a value keeps to them.

Schemas and values are anybody's, and checking must stop no thread of the worker for long. Patterns are matched by RE2
(through Arrow), in time linear in the text; Python's own matcher backtracks, and holds the interpreter's lock
meanwhile. What RE2 cannot express (look-around, references to groups) is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jsonschema import SchemaError, ValidationError
from jsonschema.validators import Draft202012Validator, extend, validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from pipeline.spec import json_text
from storage.errors import InvalidJob

LONGEST_REASON = 300
"""Characters of a validator's message that are passed on; it repeats the value."""
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_VALUES = ("const", "default", "enum", "examples")
"""Keywords that hold values, in which nothing is a schema."""


def parsed(given: Any, field: str) -> dict[str, Any]:
    """The JSON Schema, which may be given as text. Raises :class:`InvalidJob` when it is none."""
    if isinstance(given, str):
        try:
            given = json_text.loads(given)
        except ValueError as error:
            raise InvalidJob(f"is not JSON: {error}", field=field) from None
    if not isinstance(given, dict):
        raise InvalidJob(f"must be a JSON object, not {given!r}", field=field)
    try:
        json_text.check_depth(given)
    except json_text.TooDeep as error:
        raise InvalidJob(f"is {error}", field=field) from None
    if not isinstance(given.get("$schema", ""), str):
        raise InvalidJob("is no JSON Schema: ['$schema'] must be text", field=field)
    try:
        validator_for(given, Draft202012Validator).check_schema(given)
        _check_references(given, field)
        _check_patterns(given, field)
    except SchemaError as error:
        where = "".join(f"[{part!r}]" for part in error.absolute_path)
        reason = error.message[:LONGEST_REASON]
        raise InvalidJob(f"is no JSON Schema: {where and where + ': '}{reason}", field=field) from None
    except RecursionError:
        raise InvalidJob("is nested too deeply", field=field) from None
    except InvalidJob:
        raise
    except Exception as error:
        # The libraries trip over some that the meta-schema lets pass: ``{"$id": 5}`` beside an unknown ``$schema``.
        raise InvalidJob(f"is no JSON Schema: {type(error).__name__}: {error}", field=field) from None
    return given


class Schema:
    """A schema that :func:`parsed` has looked at."""

    def __init__(self, schema: dict[str, Any]) -> None:
        # With a registry of its own, no reference is fetched from anywhere.
        self._validator = _linear(validator_for(schema, Draft202012Validator))(schema, registry=Registry())

    def broken(self, value: Any) -> str | None:
        """Why the value does not keep to the schema, or ``None``."""
        try:
            self._validator.validate(value)
        except ValidationError as error:
            return f"the output breaks the schema at {error.json_path}: {error.message[:LONGEST_REASON]}"
        except Exception as error:
            # Whatever the validator makes of a strange schema, or of a number that no float holds: it is this row's.
            return f"the output cannot be held against the schema: {type(error).__name__}: {error}"[:LONGEST_REASON]
        return None


# ---- patterns ------------------------------------------------------------------------------------------------------


def _matches(pattern: str, text: str) -> bool:
    """Whether the pattern is found in the text. Raises ``ValueError`` for one that RE2 does not know."""
    # JSON can hold half of a surrogate pair, which is no text to Arrow.
    found = pc.match_substring_regex(pa.scalar(text.encode(errors="replace").decode()), _re2(pattern))
    return bool(found.as_py())


@functools.lru_cache(1024)
def _re2(pattern: str) -> str:
    """``\\u00e9``, as JSON Schema has it, in RE2's writing."""
    return _ESCAPE.sub(lambda m: f"\\x{{{m[1][1:]}}}" if len(m[1]) == 5 else m[0], pattern)


def _check_patterns(schema: dict[str, Any], field: str) -> None:
    names = {name for part in _parts(schema) for name in part}
    if {"patternProperties", "unevaluatedProperties"} <= names:
        raise InvalidJob("patternProperties beside unevaluatedProperties is not supported", field=field)
    for part in _parts(schema):
        patterns = [part["pattern"]] if isinstance(part.get("pattern"), str) else []
        if isinstance(part.get("patternProperties"), dict):
            patterns += part["patternProperties"]
        for pattern in patterns:
            try:
                _matches(pattern, "")
            except ValueError as error:  # ArrowInvalid and UnicodeEncodeError are
                reason = str(error).removeprefix("Invalid regular expression: ")
                raise InvalidJob(
                    f"the pattern {pattern[:LONGEST_REASON]!r} cannot be matched in linear time, by RE2: {reason}",
                    field=field,
                ) from None


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string") and not _matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], instance: Any, schema: Any
) -> Iterator[ValidationError]:
    if validator.is_type(instance, "object"):
        for pattern, below in patterns.items():
            for name, value in instance.items():
                if _matches(pattern, name):
                    yield from validator.descend(value, below, path=name, schema_path=pattern)


def _additional_properties(validator: Any, more: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    extras = [n for n in instance if n not in named and not any(_matches(pattern, n) for pattern in patterns)]
    if validator.is_type(more, "object"):
        for name in extras:
            yield from validator.descend(instance[name], more, path=name)
    elif not more and extras:
        yield ValidationError(f"Additional properties are not allowed ({', '.join(map(repr, extras))})")


_KEYWORDS = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
}


@functools.cache
def _linear(kind: Any) -> Any:
    """The validator of a draft, with the keywords that match patterns in linear time."""
    known = {name: ours for name, ours in _KEYWORDS.items() if name in kind.VALIDATORS}
    return extend(kind, known)  # type: ignore[no-untyped-call]


# ---- references ----------------------------------------------------------------------------------------------------


def _check_references(schema: dict[str, Any], field: str) -> None:
    # Nothing is fetched, here or by vLLM, which would let the model write anything in its place.
    resolver = Registry().resolver_with_root(Resource.from_contents(schema, default_specification=DRAFT202012))
    for part in _parts(schema):
        for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            reference = part.get(keyword)
            if not isinstance(reference, str):
                continue
            try:
                found = resolver.lookup(reference).contents
            except (Unresolvable, ValueError, LookupError, TypeError, AttributeError):
                raise InvalidJob(f"refers to {reference!r}, which it does not hold itself", field=field) from None
            if not isinstance(found, (dict, bool)):
                raise InvalidJob(f"refers to {reference!r}, which is no schema", field=field)


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """The mappings in a schema: its subschemas, and those that hold some by name."""
    if isinstance(part, dict):
        yield part
        for name, below in part.items():
            if name not in _VALUES:
                yield from _parts(below)
    elif isinstance(part, list):
        for below in part:
            yield from _parts(below)
