"""What a model is called: names, revisions, aliases, and what can only be a path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.registry import names
from pipeline.registry.names import Reference
from storage.errors import InvalidJob

words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True).filter(lambda word: word != "fake")


@given(words, st.integers(0, 10**9 - 1))
def test_a_number_after_the_name_is_a_revision(name: str, number: int) -> None:
    assert names.parse(f"{name}@{number}") == Reference(name, number=number)


@given(words, words.filter(lambda word: not word.isdigit()))
def test_a_word_after_the_name_is_an_alias(name: str, alias: str) -> None:
    assert names.parse(name) == Reference(name)
    assert names.parse(f"{name}@{alias}") == Reference(name, alias=alias)


@pytest.mark.parametrize(
    "path",
    ["./encoder", "../encoder", "/encoder", "~/encoder", "a/b", "a/b@2", "a@b/c", "a b", "@2", "a@", "a@b@c", ""],
)
def test_what_can_only_be_a_path(path: str) -> None:
    assert names.parse(path) is None


@given(st.text(max_size=30))
def test_a_reference_never_leads_out_of_its_name(text: str) -> None:
    found = names.parse(text)
    assert found is None or (not text.startswith(".") and "/" not in text)


@pytest.mark.parametrize("name", ["", "fake", "a/b", ".a", "a@b", "a b", "ä", "x" * 129])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidJob, match="NAME"):
        names.check_name(name)


@pytest.mark.parametrize("alias", ["", "2", "active", "latest", "a@b", "a/b"])
def test_aliases_that_are_refused(alias: str) -> None:
    with pytest.raises(InvalidJob, match="alias"):
        names.check_alias(alias)
