"""Words on the command line → fields of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli import values
from storage.errors import InvalidJob, InvalidSettings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("0.5", 0.5),
        ("-1e3", -1000.0),
        ("true", True),
        ("null", None),
        ('["a", "b"]', ["a", "b"]),
        ('{"a": {"b": 1}}', {"a": {"b": 1}}),
        ('"123"', "123"),
        ("float16", "float16"),
        ("True", "True"),
        ("", ""),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("[1,", "[1,"),
        (" a = b ", " a = b "),
    ],
)
def test_a_value_is_json_where_it_can_be(text: str, value: object) -> None:
    found = values.value_of(text)
    assert found == value
    assert type(found) is type(value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_every_json_value_arrives(value: object) -> None:
    assert values.key_values([f"k={json.dumps(value)}"], "--set") == {"k": value}


def test_keys_and_values() -> None:
    found = values.key_values(["max_tokens=16", "stop=a=b", "session.x=1"], "--sampling")
    assert found == {"max_tokens": 16, "stop": "a=b", "session.x": 1}
    assert values.key_values(["x=1"], "--input", literal=True) == {"x": "1"}


@pytest.mark.parametrize(
    ("items", "words"), [(["x"], "not KEY=VALUE"), (["=1"], "not KEY=VALUE"), (["a=1", "a=2"], "twice")]
)
def test_bad_pairs_name_the_option(items: list[str], words: str) -> None:
    with pytest.raises(InvalidJob, match=f"--sampling: .*{words}"):
        values.key_values(items, "--sampling")


def test_messages_keep_their_order() -> None:
    found = values.messages(["system=Be brief.", "user=1+1={sum}"])
    assert found == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1={sum}"}]
    with pytest.raises(InvalidJob, match="ROLE=TEMPLATE"):
        values.messages(["hello"])


def test_settings_by_name() -> None:
    found = values.setting_values(["flush-rows=10", "storage_options.s3.anon=true", "storage_options.s3.key=0123"])
    assert found == {"flush_rows": "10", "storage_options": {"s3": {"anon": True, "key": "0123"}}}
    for bad in ("x", "=1", "a..b=1"):
        with pytest.raises(InvalidSettings, match="--setting"):
            values.setting_values([bad])
    with pytest.raises(InvalidSettings, match="--setting"):
        values.setting_values(["a=1", "a.b=2"])


WHOLE: dict[str, Any] = {"input": ["i"], "output": "o", "model": "m", "task": "embed"}


def test_flags_win_over_the_file_and_merge_into_its_tables() -> None:
    file = {**WHOLE, "sampling": {"max_tokens": 1, "seed": 7}, "column": "text", "keep_columns": ["id"]}
    flags: dict[str, Any] = {"output": "p", "sampling": {"max_tokens": 2}, "column": None, "keep_columns": []}
    fields = values.job_fields(file, flags)
    assert fields["output"] == "p"
    assert fields["sampling"] == {"max_tokens": 2, "seed": 7}
    assert fields["column"] == "text"
    assert fields["keep_columns"] == []


def test_flags_that_were_not_given_are_left_to_the_spec() -> None:
    assert values.job_fields({}, {**WHOLE, "engine": None}) == WHOLE


def test_what_no_job_can_lack_is_asked_for() -> None:
    with pytest.raises(InvalidJob, match=r"missing INPUT, -m/--model"):
        values.job_fields({}, {**WHOLE, "input": [], "model": None})


@pytest.mark.parametrize(("name", "text"), [("job.toml", 'model = "m"\n'), ("job.json", '{"model": "m"}')])
def test_a_spec_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert values.spec_file(tmp_path / name) == {"model": "m"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("job.toml", "model = \n", "not valid TOML"),
        ("job.json", "{", "not valid JSON"),
        ("job.json", "[]", "not an object"),
        ("job.toml", None, "no such file"),
    ],
)
def test_a_bad_spec_file(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidJob, match=words):
        values.spec_file(tmp_path / name)


def test_a_schema_becomes_a_sampling_parameter(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    found = values.with_schema({"max_tokens": 32}, schema)
    assert found == {"max_tokens": 32, "structured_outputs": {"json": {"type": "object"}}}
    assert values.with_schema(None, None) is None
    with pytest.raises(InvalidJob, match="exclude each other"):
        values.with_schema({"structured_outputs": {"regex": "a"}}, schema)
    for content, words in ((b"{", "not valid JSON"), (b"NaN", "not valid JSON")):
        schema.write_bytes(content)
        with pytest.raises(InvalidJob, match=words) as caught:
            values.with_schema(None, schema)
        assert caught.value.field == "--schema"
    with pytest.raises(InvalidJob, match="no such file"):
        values.json_file(tmp_path / "missing.json", "--tools")
