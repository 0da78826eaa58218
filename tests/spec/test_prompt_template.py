"""Templates: fields, braces, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.spec.prompt_template import Template

NAMES = st.text(st.characters(exclude_characters="{}"), min_size=1).filter(str.strip)
PARTS = st.lists(st.one_of(st.tuples(st.just("text"), st.text()), st.tuples(st.just("field"), NAMES)))


@given(PARTS)
def test_what_is_put_together_comes_out(parts: list[tuple[str, str]]) -> None:
    """Any text with its braces doubled stands for itself; any field for its value, braces in it untouched."""
    row = {name: f"<{name}{{}}>" for kind, name in parts if kind == "field"}
    written = "".join(
        f"{{{part}}}" if kind == "field" else part.replace("{", "{{").replace("}", "}}") for kind, part in parts
    )
    expected = "".join(row[part] if kind == "field" else part for kind, part in parts)
    template = Template(written)
    assert template.render(row) == expected
    assert template.fields == tuple(dict.fromkeys(part for kind, part in parts if kind == "field"))


@given(st.text("{}ab "))
@example("{{{a}}}")
def test_every_text_is_a_template_or_refused_with_a_place(text: str) -> None:
    try:
        template = Template(text)
    except ValueError as error:
        assert "at character" in str(error)
        return
    rendered = template.render(dict.fromkeys(template.fields, ""))
    assert len(rendered) <= len(text)


@pytest.mark.parametrize("text", ["{", "}", "a {b", "a } b", "{}", "{ }", "{a{b}}", "{{}", "{}}"])
def test_unbalanced_braces_and_empty_fields_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at character"):
        Template(text)


@pytest.mark.parametrize("name", ["text.__class__", "text[0]", "text!r", "text:>9999999999", "a b", "0"])
def test_a_field_is_a_column_name_and_nothing_more(name: str) -> None:
    template = Template(f"<{{{name}}}>")
    assert template.fields == (name,)
    assert template.render({name: "value"}) == "<value>"
    if name.startswith("text"):
        with pytest.raises(KeyError):
            template.render({"text": "value"})


def test_braces_in_a_value_are_no_fields() -> None:
    assert Template("{x}").render({"x": "{x}"}) == "{x}"


def test_no_fields() -> None:
    assert Template("plain").render({}) == "plain"
    assert Template("").render({}) == ""
    assert Template("plain").fields == ()
