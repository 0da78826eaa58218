"""Whether an answer keeps to the form that was asked for."""

from __future__ import annotations

import json
import re
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.generation.structured_output import check, form
from storage.errors import InvalidJob

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(LEAVES, lambda below: st.lists(below) | st.dictionaries(st.text(), below))
SCHEMA = {
    "type": "object",
    "properties": {"stars": {"$ref": "#/$defs/stars"}},
    "required": ["stars"],
    "$defs": {"stars": {"type": "integer", "maximum": 5}},
}


def broken(given: dict[str, Any], text: str, *, ended: bool = True) -> str | None:
    check(given)
    asked = form(given)
    assert asked is not None
    return asked.broken(text, ended=ended)


@given(JSON)
def test_any_object_is_an_object_and_nothing_else_is(value: Any) -> None:
    why = broken({"json_object": True}, json.dumps(value))
    assert (why is None) == isinstance(value, dict)


@given(JSON, st.integers(0, 10**6))
def test_a_part_of_an_object_is_none(value: Any, at: int) -> None:
    whole = json.dumps({"a": value})
    assert broken({"json_object": True}, whole[: at % len(whole)], ended=False) is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"stars": 3}', None),
        (' {"stars":\n3, "more": []} ', None),
        ('{"stars": 6}', "at $.stars: 6 is greater than the maximum of 5"),
        ('{"stars": true}', "at $.stars: True is not of type 'integer'"),
        ("{}", "'stars' is a required property"),
        ('{"stars": 3} and more', "is not JSON"),
        ('{"stars": NaN}', "NaN is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_schema(text: str, words: str | None) -> None:
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        why = broken({"json": schema}, text)
        assert why is None if words is None else words in (why or "")


EXPLOSIVE = "^(a+)+$"
"""Python's matcher takes twice as long for every letter more: years for the texts below."""
LONG = "a" * 200 + "b"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"enum": [LONG], "pattern": EXPLOSIVE}, LONG),
        ({"patternProperties": {EXPLOSIVE: False}, "minProperties": 2}, {LONG: 1}),
        ({"patternProperties": {EXPLOSIVE: True}, "additionalProperties": False}, {LONG: 1}),
        ({"propertyNames": {"pattern": EXPLOSIVE}}, {LONG: 1}),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "pattern": EXPLOSIVE}, LONG),
    ],
)
def test_patterns_are_matched_in_linear_time(schema: dict[str, Any], value: Any) -> None:
    assert "breaks the schema" in (broken({"json": schema}, json.dumps(value)) or "")


PATTERNS = st.sampled_from(["^a", "b$", "[0-9]+", "^(x|é)*$", "\\u00e9", "a.b", "\\\\u00e9"])
NAMES = st.text(alphabet="abx01é.\\\n")


@given(PATTERNS, NAMES)
def test_a_pattern_is_found_where_python_finds_it(pattern: str, text: str) -> None:
    hypothesis.assume(not text.endswith("\n"))  # in Python, $ matches before it as well; in JSON Schema it does not
    expected = re.search(pattern, text) is not None
    assert (broken({"json": {"pattern": pattern}}, json.dumps(text)) is None) == expected
    named = {"json": {"patternProperties": {pattern: {"type": "null"}}, "additionalProperties": {"type": "string"}}}
    assert (broken(named, json.dumps({text: None})) is None) == expected
    assert (broken(named, json.dumps({text: "x"})) is None) == (not expected)
    closed = {"json": {"patternProperties": {pattern: True}, "properties": {"b": True}, "additionalProperties": False}}
    assert (broken(closed, json.dumps({text: 1})) is None) == (expected or text == "b")


def test_half_a_surrogate_pair_matches_no_worse_than_other_text() -> None:
    assert broken({"json": {"pattern": "^.$"}}, '"\\ud800"') is None


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"pattern": "^(?=.*[0-9]).*$"}, "linear time"),
        ({"properties": {"a": {"patternProperties": {"(a)\\1": {}}}}}, "linear time"),
        ({"patternProperties": {"a": {}}, "allOf": [{"unevaluatedProperties": False}]}, "not supported"),
        ({"enum": ["a"], "$ref": "#/enum/x"}, "does not hold itself"),
        ({"enum": ["a"], "$ref": "#/enum/0"}, "no schema"),
        ({"$dynamicRef": "#nope"}, "does not hold itself"),
        ({"$recursiveRef": "http://169.254.169.254/"}, "does not hold itself"),
        ({"$schema": 5}, "must be text"),
        ({"$schema": "x", "$id": 5}, "no JSON Schema"),
    ],
)
def test_schemas_that_cannot_be_held_to_are_refused(schema: dict[str, Any], words: str) -> None:
    for asked in (schema, json.dumps(schema)):
        with pytest.raises(InvalidJob, match=words):
            check({"json": asked})


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"multipleOf": 0.01}, "9" * 310),
        ({"$ref": "#"}, "1"),
    ],
)
def test_what_the_validator_trips_over_is_the_rows_error(schema: dict[str, Any], text: str) -> None:
    assert "cannot be held against the schema" in (broken({"json": schema}, text) or "")


def test_what_was_cut_off_says_so() -> None:
    assert "it was cut off" in (broken({"json": SCHEMA}, '{"stars"', ended=False) or "")
    assert "it was cut off" not in (broken({"json": SCHEMA}, '{"stars"') or "")


def test_a_choice() -> None:
    given = {"choice": ["yes", "no"]}
    assert broken(given, "yes") is None
    assert broken(given, "yes", ended=False) is None, "it is complete, whatever ended it"
    assert "none of the choices" in (broken(given, "yess") or "")


@pytest.mark.parametrize(
    ("given", "whole", "part"),
    [
        ({"regex": "[0-9]{4}(-x)?"}, "1234-x", "123"),
        ({"regex": "[0-9]{4}(-x)?"}, "1234-x", "1234"),
        ({"grammar": 'root ::= "a" root | "b"'}, "aab", "aa"),
        ({"regex": "(yes)?"}, "yes", ""),
        ({"regex": "[0-9]+!"}, "12!", "12"),
        ({"choice": ["a", "ab"]}, "ab", "a"),
        ({"json": {"type": "object"}}, '{"n": 12}', '{"n": 12'),
        ({"json": {"type": "string"}}, '"12"', '"12'),
        ({"json": {"type": "boolean"}}, "true", "tru"),
    ],
)
def test_what_was_cut_may_be_complete(given: dict[str, Any], whole: str, part: str) -> None:
    pytest.importorskip("xgrammar")
    assert broken(given, whole, ended=False) is None
    assert "cut off" in (broken(given, part, ended=False) or "")
    assert broken(given, whole) is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"json": {"type": "integer"}}, "12"),
        ({"json": {"type": "number"}}, "1.5"),
        ({"json": {"type": "integer", "maximum": 99}}, "-3"),
        ({"choice": ["a", "ab"]}, "a"),
        ({"regex": "[0-9]+"}, "12"),
        ({"grammar": 'root ::= "x" [0-9]*'}, "x1"),
    ],
)
def test_what_could_have_gone_on_was_cut_off(given: dict[str, Any], text: str) -> None:
    """What is there happens to be of the form; more of it would be, too."""
    pytest.importorskip("xgrammar")
    assert broken(given, text) is None
    assert "cut off" in (broken(given, text, ended=False) or "")


def test_a_grammar_that_only_its_backend_knows() -> None:
    """Nothing is known of what was cut: it does not pass for complete."""
    assert broken({"grammar": "start: %%%"}, "x") is None
    assert broken({"grammar": "start: %%%"}, "x", ended=False) is not None
    assert broken({"structural_tag": "{}"}, "x", ended=False) is not None


def test_nothing_asked_nothing_checked() -> None:
    assert form(None) is None
    assert form({}) is None
