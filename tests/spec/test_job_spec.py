"""The job's public contract: what is accepted, what is refused with which field, and what makes two jobs the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.spec.job_spec import NOT_PART_OF_THE_WORK, JobSpec, Task, parse
from storage.errors import InvalidJob

BASE = {"input": "in.parquet", "output": "out", "model": "m"}
MINIMAL: dict[Task, dict[str, Any]] = {
    Task.GENERATE: {"prompt": "{text}"},
    Task.CHAT: {"prompt": "{text}"},
    Task.EMBED: {"column": "text"},
    Task.CLASSIFY: {"column": "text"},
    Task.SCORE: {"column": "text"},
    Task.TENSOR: {},
}
VALUES: dict[str, Any] = {
    "prompt": "{text}",
    "messages": [{"role": "user", "content": "{text}"}],
    "column": "text",
    "pair_column": "other",
    "inputs": {"x": "y"},
    "sampling": {"n": 1},
    "chat_template_kwargs": {"a": 1},
    "prompt_token_column": "ids",
    "sampling_columns": {"seed": "s"},
    "tools": [{"type": "function", "function": {"name": "weigh"}}],
    "image_column": "photo",
    "audio_column": "call",
    "video_column": "film",
    "adapters": {"red": "./red"},
    "dimensions": 64,
}
MEDIA = ("image_column", "audio_column", "video_column")
READ: dict[Task, set[str]] = {
    Task.GENERATE: {"prompt", "prompt_token_column", "sampling", "sampling_columns", "adapters", *MEDIA},
    Task.CHAT: {
        *("prompt", "messages", "column", "chat_template_kwargs", "tools"),
        *("sampling", "sampling_columns", "adapters", *MEDIA),
    },
    Task.EMBED: {"column", "dimensions"},
    Task.CLASSIFY: {"column", "pair_column"},
    Task.SCORE: {"column", "pair_column"},
    Task.TENSOR: {"inputs"},
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
JSON = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)


def spec(task: Task = Task.GENERATE, **fields: Any) -> JobSpec:
    return parse({**BASE, "task": task, **MINIMAL[task], **fields})


def refused(**fields: Any) -> InvalidJob:
    with pytest.raises(InvalidJob) as caught:
        parse({**BASE, **fields})
    return caught.value


@pytest.mark.parametrize("task", list(Task))
def test_the_least_that_a_task_needs(task: Task) -> None:
    made = spec(task)
    assert made.task is task
    assert made.input == ("in.parquet",)
    assert (made.engine, made.tenant, made.priority) == ("auto", "default", 0)


@pytest.mark.parametrize("task", [Task.GENERATE, Task.CHAT, Task.EMBED, Task.CLASSIFY, Task.SCORE])
def test_what_a_task_cannot_do_without(task: Task) -> None:
    error = refused(task=task)
    assert f"task '{task}' needs" in error.message
    assert str(error).startswith("task '")


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("name", list(VALUES))
def test_what_a_task_does_not_read_is_refused(task: Task, name: str) -> None:
    fields = {**BASE, "task": task, **MINIMAL[task]}
    if name in READ[task]:
        if name in ("messages", "column", "prompt_token_column"):
            fields.pop("prompt", None)
        assert getattr(parse({**fields, name: VALUES[name]}), name)
    else:
        with pytest.raises(InvalidJob, match=f"does not read.*{name}"):
            parse({**fields, name: VALUES[name]})


def test_chat_takes_one_way_to_say_it() -> None:
    assert "exactly one" in refused(task="chat", prompt="{a}", column="b").message


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"inpt": "x"}, "inpt", "unknown field"),
        ({"task": "summarise"}, "task", "generate"),
        ({"prompt": "{"}, "prompt", "unbalanced"),
        ({"prompt": None}, None, "needs prompt"),
        ({"input": []}, "input", "at least 1"),
        ({"output": ""}, "output", "at least 1"),
        ({"output": "simplecache::file:///etc"}, "output", "chains filesystems"),
        ({"output": "s3:/bucket/out"}, "output", "two slashes"),
        ({"output": "my_store://bucket/out"}, "output", "no scheme"),
        ({"input": ["file://host/a.parquet"]}, "input.0", "'host'"),
        ({"input": ["LOCAL://host/a.parquet"]}, "input.0", "'host'"),
        ({"input": ["a.parquet", "zip::b.parquet"]}, "input.1", "chains filesystems"),
        ({"completion_window": "soon"}, "completion_window", "'24h'"),
        ({"completion_window": "-1h"}, "completion_window", "duration"),
        ({"tenant": "a/b"}, "tenant", "pattern"),
        ({"output_prefix": "a b"}, "output_prefix", "pattern"),
        ({"priority": 101}, "priority", "100"),
        ({"shard_rows": 0}, "shard_rows", "1"),
        ({"max_failed_rows": -1}, "max_failed_rows", "0"),
        ({"pooling": "max"}, "pooling", "mean"),
        ({"sampling": {"temperature": float("inf")}}, "sampling", "plain JSON"),
        ({"sampling": {"temperature": float("nan")}}, "sampling", "plain JSON"),
        ({"engine_options": {"a": {1, 2}}}, "engine_options", "plain JSON"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"prompt_token_column": "ids"}, None, "never both"),
        ({"image_column": "x", "prompt": None, "prompt_token_column": "ids"}, None, "not with prompt_token_column"),
        ({"image_column": "x", "overlong": "truncate"}, None, "cannot be truncated"),
        ({"audio_column": "x", "prompt": None, "prompt_token_column": "ids"}, None, "sounds go with a prompt"),
        ({"video_column": "x", "overlong": "truncate"}, None, "videos cannot be truncated"),
        ({"audio_sampling_rate": 8000}, None, "audio_column, which is not given"),
        ({"video_frame_rate": 2}, None, "video_column, which is not given"),
        ({"audio_column": "x", "audio_sampling_rate": 1}, "audio_sampling_rate", "greater than or equal to 1000"),
        ({"adapter_column": "who"}, None, "needs adapters"),
        ({"adapters": {"a": "x", "b": "y"}}, None, "adapter_column says"),
        ({"task": "chat", "tools": [{"name": "f"}]}, "tools", "tool 0 must be"),
        ({"task": "embed", "prompt": None, "column": "a", "dimensions": 0}, "dimensions", "1"),
        ({"task": "chat", "prompt": None, "messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "user"),
        ({"task": "chat", "prompt": None, "messages": [{"role": "user", "content": "}"}]}, "messages", "unbalanced"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], field: str | None, words: str) -> None:
    error = refused(**{"task": "generate", "prompt": "{text}", **fields})
    assert error.field == field
    assert words in error.message
    assert "pydantic" not in str(error)
    assert "Value error" not in str(error)


def test_all_problems_are_told_at_once() -> None:
    error = refused(task="generate", prompt="{text}", priority=1000, shard_rows=0)
    assert "priority: " in str(error)
    assert "shard_rows: " in str(error)
    assert error.field == "shard_rows"


@pytest.mark.parametrize(
    ("window", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86400), (" 1.5 d ", 129600), ("36500d", 3.1536e9)]
)
def test_windows(window: str, seconds: float) -> None:
    assert spec(completion_window=window).window_seconds == seconds


def test_no_tenant_is_the_default_one() -> None:
    assert spec(tenant=None).tenant == "default"


def test_it_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        spec().prompt = "x"  # type: ignore[misc]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "sampling": st.dictionaries(TEXT, JSON),
            "metadata": st.dictionaries(TEXT, TEXT),
            "keep_columns": st.none() | st.lists(TEXT, unique=True),
            "max_failed_rows": st.none() | st.integers(0, 10**9),
            "priority": st.integers(-100, 100),
            "engine_options": st.dictionaries(TEXT, JSON),
        },
    )
)
def test_json_and_back_is_the_same_job(fields: dict[str, Any]) -> None:
    made = spec(**fields)
    again = JobSpec(**json.loads(json.dumps(made.model_dump(mode="json"))))
    assert again == made
    assert again.work_hash() == made.work_hash()


OTHERS: dict[str, Any] = {
    "priority": 5,
    "metadata": {"a": "b"},
    "completion_window": "1h",
    "overwrite": True,
    "idempotency_key": "k",
    "input": "other.parquet",
    "output": "elsewhere",
    "model": "other",
    "engine": "vllm",
    "engine_options": {"a": 1},
    "prompt": "{other}",
    "sampling": {"n": 2},
    "overlong": "truncate",
    "keep_columns": ("a",),
    "output_prefix": "p_",
    "shard_rows": 7,
    "shard_bytes": 7,
    "max_failed_rows": 7,
    "tenant": "other",
    "encoding": "latin-1",
    "csv_delimiter": ";",
    "csv_types": "text",
    "csv_schema": {"zip": "string"},
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_the_hash_follows_what_decides_the_work(name: str) -> None:
    changed = spec(**{name: OTHERS[name]}).work_hash() != spec().work_hash()
    assert changed is (name not in NOT_PART_OF_THE_WORK)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("encoding", "klingon", "no encoding"),
        ("encoding", "rot13", "no encoding"),
        ("csv_delimiter", ";;", "one ASCII character"),
        ("csv_delimiter", '"', "one ASCII character"),
        ("csv_delimiter", "a", "values hold it"),
        ("csv_types", "guess", "'auto' or 'text'"),
        ("csv_schema", {"zip": "postcode"}, "no type of a CSV column"),
        ("csv_schema", {"price": "decimal(2,3)"}, "no type of a CSV column"),
    ],
)
def test_what_no_text_file_can_be_read_by_is_refused(name: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidJob, match=f"{name}.*{reason}"):
        parse({"input": "in", "output": "out", "model": "fake", "task": "generate", "prompt": "{text}", name: value})


@pytest.mark.parametrize("text", ["\\t", "tab", "\t"])
def test_a_tab_may_be_spelled(text: str) -> None:
    assert spec(csv_delimiter=text).csv_delimiter == "\t"


def test_the_columns_that_are_wanted() -> None:
    assert spec(prompt="{a} {b}", keep_columns=("c",)).wanted_columns == {"a", "b", "c"}
    assert spec(prompt="{a}").wanted_columns is None, "all are kept"
    assert spec(prompt="no column", keep_columns=()).wanted_columns is None


def test_the_fields_left_out_of_the_hash_exist() -> None:
    assert set(JobSpec.model_fields) >= NOT_PART_OF_THE_WORK


def test_the_order_of_a_schemas_properties_is_part_of_the_work() -> None:
    """Answers follow it."""
    base = {"input": "in", "output": "out", "model": "m", "task": "generate", "prompt": "{text}"}
    first, second = (
        parse(base | {"sampling": {"structured_outputs": {"json": {"properties": {key: {} for key in names}}}}})
        for names in ("ab", "ba")
    )
    assert first.work_hash() != second.work_hash()


def test_the_order_of_a_tools_properties_is_part_of_the_work() -> None:
    """They are in the prompt, as they were written."""
    base = {"input": "in", "output": "out", "model": "m", "task": "chat", "prompt": "{text}"}
    first, second = (
        parse(base | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {k: {} for k in names}}}]})
        for names in ("ab", "ba")
    )
    assert first.work_hash() != second.work_hash()
