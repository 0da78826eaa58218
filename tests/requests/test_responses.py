"""Response bodies, held against the types of OpenAI's own client; and the lines of its batch files."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from pipeline.engines.generation.request_rows import AUTO_TOOLS, FORCED_TOOLS
from pipeline.engines.generation.sampling import SAMPLING
from pipeline.requests import lines, responses
from pipeline.requests.body import parse
from pipeline.requests.responses import Answer
from pipeline.spec.request_fields import CHAT, COMPLETIONS, EMBEDDINGS

ALL = frozenset(SAMPLING) | {AUTO_TOOLS, FORCED_TOOLS}
CHATTED = {"model": "my/model", "messages": [{"role": "user", "content": "hello"}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def token(text: str, logprob: float, *top: tuple[str, float]) -> dict[str, Any]:
    likely = [{"token_id": 1, "token": name, "logprob": value} for name, value in top]
    return {"token_id": 0, "token": text, "logprob": logprob, "top_logprobs": likely}


def chat(answer: Answer, **more: Any) -> ChatCompletion:
    request = parse(CHAT, CHATTED | more, honoured=ALL)
    body = responses.generated(request, [answer], id="1", created=5)
    return ChatCompletion.model_validate_json(json.dumps(body), strict=True)


def test_a_chat_has_its_choices_in_order_and_the_models_name() -> None:
    found = chat(Answer(["a", "b"], ["stop", "length"], 3, 1, 7), n=2)
    assert [(c.index, c.message.content, c.finish_reason) for c in found.choices] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
    assert found.model == "my/model"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, 7, 10)
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 1


def test_logprobs_of_a_chat_are_finite_and_have_bytes() -> None:
    probable = [[token("é", -0.5, ("é", -0.5), ("x", float("-inf")))]]
    found = chat(Answer(["é"], ["stop"], 1, 0, 1, probable), logprobs=True, top_logprobs=2)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].bytes == list("é".encode())
    assert [(top.token, top.logprob) for top in logprobs.content[0].top_logprobs] == [("é", -0.5), ("x", -9999.0)]


@pytest.mark.parametrize(
    ("choice", "text", "calls", "reason"),
    [
        ({"type": "function", "function": {"name": "f"}}, '{"a": 1}', [("f", '{"a": 1}')], "stop"),
        ("required", '[{"name": "f", "parameters": {"a": 1}}]', [("f", '{"a": 1}')], "tool_calls"),
        ("required", '[{"name": "f", "par', None, "stop"),
        ("none", '{"a": 1}', None, "stop"),
    ],
)
def test_a_demanded_call_is_in_tool_calls(choice: Any, text: str, calls: Any, reason: str) -> None:
    found = chat(Answer([text], ["stop"], 1, 0, 1), tools=TOOLS, tool_choice=choice).choices[0]
    given = found.message.tool_calls
    made = None if given is None else [(c.function.name, c.function.arguments) for c in given if c.type == "function"]
    assert made == calls
    assert found.message.content == (text if calls is None else None)
    assert found.finish_reason == reason


def test_completions_of_several_prompts_are_one_response() -> None:
    request = parse(COMPLETIONS, {"model": "m", "prompt": ["a", "b"], "n": 2, "logprobs": 1}, honoured=ALL)
    probable = [[token("t", -1.0, ("t", -1.0)), token("u", -2.0, ("v", -0.5))]] * 2
    answers = [Answer([f"{p}0", f"{p}1"], ["stop", "stop"], 2, 0, 3, probable) for p in "ab"]
    found = Completion.model_validate_json(
        json.dumps(responses.generated(request, answers, id="1", created=5)), strict=True
    )
    assert [(c.index, c.text) for c in found.choices] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    logprobs = found.choices[3].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["t", "u"], [0, 1])
    assert logprobs.top_logprobs == [{"t": -1.0}, {"v": -0.5}]
    assert found.usage is not None
    assert found.usage.total_tokens == 10


def test_embeddings_are_the_same_numbers_as_json_and_as_base64() -> None:
    vectors = [np.array([0.1, -1e-30, 3.5], np.float32), np.array([1, 2, 3], np.float32)]
    plain = parse(EMBEDDINGS, {"model": "m", "input": ["a", "b"]}, honoured=ALL)
    found = CreateEmbeddingResponse.model_validate_json(json.dumps(responses.embedded(plain, vectors, 5)), strict=True)
    assert [item.index for item in found.data] == [0, 1]
    for item, vector in zip(found.data, vectors, strict=True):
        assert (np.array(item.embedding, np.float32) == vector).all()
    assert "0.1," in json.dumps(responses.embedded(plain, vectors, 5))
    packed = parse(EMBEDDINGS, {"model": "m", "input": ["a", "b"], "encoding_format": "base64"}, honoured=ALL)
    body = responses.embedded(packed, vectors, 5)
    assert base64.b64decode(body["data"][0]["embedding"]) == vectors[0].tobytes()


def test_a_success_line() -> None:
    row = {"custom_id": 'a"b', "response": '{"x": 1}', "error": None}
    answered, line = lines.line_of("job", row)
    found = json.loads(line)
    assert answered
    assert line.endswith(b"\n")
    assert (found["custom_id"], found["error"], found["response"]["body"]) == ('a"b', None, {"x": 1})
    assert found["response"]["status_code"] == 200
    assert lines.line_of("job", row)[1] == line
    assert json.loads(lines.line_of("other", row)[1])["id"] != found["id"]


@pytest.mark.parametrize(
    ("code", "message", "status", "param"),
    [
        ("unsupported_parameter", "logit_bias: no", 400, "logit_bias"),
        ("invalid_value", "the chat template refuses the messages: x", 400, None),
        ("prompt_too_long", "long", 400, None),
        ("poison_row", "died", 500, None),
        ("request_timeout", "late", None, None),
        ("batch_cancelled", "cancelled", None, None),
    ],
)
def test_an_error_line(code: str, message: str, status: int | None, param: str | None) -> None:
    row = {"custom_id": "a", "out_response": None, "error": {"code": code, "message": message}}
    answered, line = lines.line_of("job", row, "out_")
    found = json.loads(line)
    assert not answered
    assert found["error"] == {"code": code, "message": message}
    if status is None:
        assert found["response"] is None
    else:
        assert found["response"]["status_code"] == status
        assert found["response"]["body"]["error"]["param"] == param
