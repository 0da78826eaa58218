"""Whether an answer keeps to the form that was asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.structured_output import check, form

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
        ({"regex": "[0-9]{4}(-x)?"}, "1234", "123"),
        ({"regex": "[0-9]{4}(-x)?"}, "1234-x", "1234-"),
        ({"grammar": 'root ::= "a" root | "b"'}, "aab", "aa"),
        ({"regex": "(yes)?"}, "", "y"),
    ],
)
def test_what_was_cut_may_be_complete(given: dict[str, Any], whole: str, part: str) -> None:
    pytest.importorskip("xgrammar")
    assert broken(given, whole, ended=False) is None
    assert "cut off" in (broken(given, part, ended=False) or "")
    assert broken(given, whole) is None


def test_a_grammar_that_only_its_backend_knows() -> None:
    """Nothing is known of what was cut: it does not pass for complete."""
    assert broken({"grammar": "start: %%%"}, "x") is None
    assert broken({"grammar": "start: %%%"}, "x", ended=False) is not None
    assert broken({"structural_tag": "{}"}, "x", ended=False) is not None


def test_nothing_asked_nothing_checked() -> None:
    assert form(None) is None
    assert form({}) is None
