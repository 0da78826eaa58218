"""What a request may ask for: parsed, translated to an engine's parameters, or refused with the parameter at fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines.generation.request_rows import AUTO_TOOLS, FORCED_TOOLS, TEMPLATE
from pipeline.engines.generation.sampling import SAMPLING
from pipeline.requests.body import MOST_PROMPTS, parse
from pipeline.requests.faults import RequestError, error_body
from pipeline.requests.parameters import IDLE, LABELS
from pipeline.spec.request_fields import CHAT, COMPLETIONS, EMBEDDINGS, TASK_OF

ALL = frozenset(SAMPLING) | {AUTO_TOOLS, FORCED_TOOLS, TEMPLATE}
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(**more: Any) -> Any:
    return parse(CHAT, HELLO | more, honoured=ALL)


def complete(prompt: Any, **more: Any) -> Any:
    return parse(COMPLETIONS, {"model": "m", "prompt": prompt, **more}, honoured=ALL)


def embed(text: Any, **more: Any) -> Any:
    return parse(EMBEDDINGS, {"model": "m", "input": text, **more}, honoured=frozenset())


def fault(endpoint: str, body: Any, honoured: frozenset[str] = ALL) -> dict[str, Any]:
    """The error that the API would answer with."""
    with pytest.raises(RequestError) as raised:
        parse(endpoint, body, honoured=honoured)
    found: dict[str, Any] = error_body(raised.value.code, raised.value.message)["error"]
    assert found["param"] == raised.value.param
    return found


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, {"max_tokens": None}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7, "max_tokens": 7}, {"max_tokens": 7}),
        (
            {"temperature": 0, "seed": 3, "stop": ["a", "b"], "top_p": None},
            {"temperature": 0, "seed": 3, "stop": ["a", "b"]},
        ),
        ({"n": 3, "top_k": 5}, {"n": 3, "top_k": 5}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
        ({"logprobs": False}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"structured_outputs": {"json": SCHEMA}},
        ),
    ],
)
def test_the_parameters_of_a_chat(given: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert chat(**given).sampling == {"max_tokens": None} | sampling


def test_the_jobs_sampling_stands_where_a_request_says_nothing() -> None:
    defaults = {"temperature": 0.5, "max_tokens": 9}
    assert parse(CHAT, HELLO, honoured=ALL, defaults=defaults).sampling == defaults
    assert parse(CHAT, HELLO | {"max_tokens": 2}, honoured=ALL, defaults=defaults).sampling["max_tokens"] == 2


def test_a_completion_has_sixteen_tokens_unless_it_says_more() -> None:
    assert complete("a").sampling["max_tokens"] == 16
    assert complete("a", max_tokens=40, logprobs=2).sampling == {"max_tokens": 40, "logprobs": 2}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ([1, 2],)), ([[1], [2, 3]], ([1], [2, 3]))],
)
def test_a_prompt_is_text_or_tokens_or_a_list_of_either(prompt: Any, prompts: Any) -> None:
    assert complete(prompt).prompts == prompts


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", 1], [[1], []], [True], {"a": 1}, 3, [[1], "a"], [-1]])
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    assert fault(COMPLETIONS, {"model": "m", "prompt": prompt})["param"] == "prompt"


def test_inputs_are_texts() -> None:
    assert embed(["a", "b"], encoding_format="base64", dimensions=4).prompts == ("a", "b")
    assert fault(EMBEDDINGS, {"model": "m", "input": [1, 2]})["code"] == "unsupported_parameter"
    assert fault(EMBEDDINGS, {"model": "m", "input": ["a"] * (MOST_PROMPTS + 1)})["param"] == "input"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"stream": True}, "stream"),
        ({"store": True}, "store"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"functions": []}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"echo": 0}, "echo"),
    ],
)
def test_what_is_not_supported_is_named(more: dict[str, Any], param: str) -> None:
    found = fault(CHAT, HELLO | more)
    assert (found["code"], found["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    ("more", "honoured", "param"),
    [
        ({"logit_bias": {"1": 2}}, frozenset(), "logit_bias"),
        ({"logprobs": True}, frozenset(), "logprobs"),
        ({"response_format": {"type": "json_object"}}, frozenset(), "response_format"),
        ({"structured_outputs": {"regex": "a"}}, frozenset(), "structured_outputs"),
        ({"tools": [WEATHER]}, ALL - {AUTO_TOOLS}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "required"}, ALL - {FORCED_TOOLS}, "tool_choice"),
        ({"chat_template_kwargs": {"a": 1}}, ALL - {TEMPLATE}, "chat_template_kwargs"),
    ],
)
def test_what_the_engine_cannot_honour_is_named(more: dict[str, Any], honoured: frozenset[str], param: str) -> None:
    found = fault(CHAT, HELLO | more, honoured)
    assert (found["code"], found["param"]) == ("unsupported_parameter", param)
    parse(CHAT, HELLO | more, honoured=ALL)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": {"a": 1}}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "text"}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_what_is_wrong_is_named(more: dict[str, Any], param: str) -> None:
    found = fault(CHAT, HELLO | more)
    assert found["code"] in ("invalid_value", "missing_value", "invalid_utf8")
    assert found["param"] == param
    assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize("text", ["", "{", "NaN", '{"model": "m", "temperature": NaN}', "[]", "3", '"{}"', "[" * 5000])
def test_text_that_is_no_request(text: str) -> None:
    fault(CHAT, text)


def test_json_text_is_parsed_and_text_within_it_too() -> None:
    text = json.dumps(HELLO)
    assert parse(CHAT, text, honoured=ALL) == parse(CHAT, json.dumps(text), honoured=ALL) == chat()


def test_a_demanded_call_is_text_of_a_form() -> None:
    named = chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}})
    assert named.sampling["structured_outputs"] == {"json": WEATHER["function"]["parameters"]}  # type: ignore[index]
    required = chat(tools=[WEATHER], tool_choice="required")
    assert required.sampling["structured_outputs"]["json"]["type"] == "array"
    assert "structured_outputs" not in chat(tools=[WEATHER], tool_choice="none").sampling
    assert fault(
        CHAT, HELLO | {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}
    )


def test_what_asks_for_nothing_is_fine() -> None:
    idle = {name: values[0] for name, values in IDLE.items()}
    assert chat(**idle, **dict.fromkeys(LABELS - {"model"}, "x")) == chat()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
NAMES = ["model", "messages", "prompt", "input", "n", "stop", "tools", "tool_choice", "logprobs", "response_format"]


@settings(max_examples=50)
@given(st.sampled_from(sorted(TASK_OF)), JSON | st.dictionaries(st.sampled_from(NAMES) | st.text(), JSON))
def test_whatever_a_body_holds_it_is_a_request_or_an_error_with_a_code(endpoint: str, body: Any) -> None:
    try:
        parse(endpoint, body, honoured=ALL)
    except RequestError as error:
        assert error.code in ("invalid_value", "missing_value", "unsupported_parameter", "invalid_utf8")
