"""What generate and chat can be asked for beyond plain text: the answers are those of vLLM's own entry points."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from examples.tiny_llama import build_llama
from pipeline.engines.base import Cancellation, EngineContext, RowBatch, RowFailure
from pipeline.engines.testing import run
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.models.model import Model
from pipeline.requests.engine import answering
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidJob
from tests.engines.vllm import support
from tests.engines.vllm.models.tiny_adapter import build_adapter
from tests.engines.vllm.reference import Question, Reference

pytestmark = pytest.mark.vllm

OPTIONS = {
    **support.OPTIONS,
    "enable_lora": True,
    "max_lora_rank": 8,
    "max_loras": 2,
    # A model that was never trained would write white space between two values for ever.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ mood or '' }}{% endif %}"
)
PROMPTS = ["Name a river.", "The parcel weighs", "Question: what is 12 times 7?", "x"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weigh",
            "description": "Weighs a parcel.",
            "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}},
        },
    }
]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does parcel 5567 weigh?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weigh", "arguments": '{"number": 5567}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "3.75 kg"},
]
SCHEMA = {
    "type": "object",
    "properties": {"positive": {"type": "boolean"}, "stars": {"enum": [1, 2, 3]}},
    "required": ["positive", "stars"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "yes " mood | "no"\nmood ::= "sir" | "madam"'
RANDOM = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 10}
OWN: list[dict[str, Any]] = [
    {"temperature": 0, "seed": 1},
    {"temperature": 1.0, "seed": 7},
    {"max_tokens": 3, "seed": 9},
    {"stop": ["a", "o"], "seed": 11},
]
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA},
    "json as text": {"json": json.dumps(SCHEMA)},
    "regex": {"regex": r"[A-C][0-9]{3}(-x)?"},
    "choice": {"choice": ["the Rhine", "the Nile", "neither"]},
    "grammar": {"grammar": GRAMMAR},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    llama = build_llama(folder / "llama")
    (llama / "chat_template.jinja").write_text(TEMPLATE)
    build_adapter(folder / "red", 1)
    build_adapter(folder / "blue", 2, rank=8)
    return folder


def questions(folder: Path) -> dict[str, Question]:
    greedy = dict(support.GREEDY)
    found: dict[str, Question] = {
        "seed": ("generate", [PROMPTS], {**RANDOM, "seed": 3}, None),
        "own": ("generate", [PROMPTS], [{**RANDOM, **own} for own in OWN], None),
        "several": ("generate", [PROMPTS], {**RANDOM, "seed": 3, "n": 3, "logprobs": 1}, None),
        "stop": ("generate", [PROMPTS], {**greedy, "max_tokens": 40, "stop": ["a", "it"]}, None),
        "logprobs": ("generate", [PROMPTS], {**greedy, "logprobs": 3}, None),
        "wanted": ("generate", [PROMPTS], {**greedy, "logprob_token_ids": [5, 300]}, None),
        "tokens": ("generate", [[{"prompt_token_ids": [1, 300, 17]}, {"prompt_token_ids": [44]}]], greedy, None),
        "tools": ("chat", [[TALK], {"tools": TOOLS, "chat_template_kwargs": {"mood": "gay"}}], greedy, None),
        "red": ("generate", [PROMPTS], greedy, str(folder / "red")),
        "blue": ("generate", [PROMPTS], greedy, str(folder / "blue")),
        "plain": ("generate", [PROMPTS], greedy, None),
    }
    for name, constraint in CONSTRAINTS.items():
        asked = {**RANDOM, "seed": 5, "max_tokens": 40, "structured_outputs": constraint}
        found[name] = ("generate", [PROMPTS], asked, None)
    return found


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    asked = list(questions(folder).values())
    reference = Reference(tmp_path_factory.mktemp("reference"), [(str(folder / "llama"), OPTIONS, asked)])
    yield reference
    reference.close()


@pytest.fixture(scope="module")
def engine(folder: Path, reference: Reference) -> Iterator[VllmEngine]:
    engine = VllmEngine(model(folder), Task.GENERATE, OPTIONS, EngineContext(folder / "cache"))
    engine.load()
    yield engine
    engine.close()


def model(folder: Path) -> Model:
    return support.model_at(folder / "llama")


def make_spec(task: str = "generate", **fields: Any) -> JobSpec:
    return support.make_spec(task, **{"engine_options": OPTIONS, **fields})


def answers(engine: VllmEngine, spec: JobSpec, batch: RowBatch | None = None) -> list[Any]:
    found = run(engine, spec, [support.texts(*PROMPTS) if batch is None else batch])
    return [found[row] for row in sorted(found)]


def columns(**given: Any) -> RowBatch:
    batch = pa.RecordBatch.from_pydict(given)
    return RowBatch(np.arange(batch.num_rows), batch)


def expected(folder: Path, reference: Reference, name: str) -> list[Any]:
    (found,) = reference.answers()
    return list(found[list(questions(folder)).index(name)])


def same(found: list[Any], wanted: list[Any]) -> None:
    """The columns of an answer are vLLM's own answer, token for token."""
    assert len(found) == len(wanted)
    for answer, known in zip(found, wanted, strict=True):
        assert not isinstance(answer, RowFailure), answer
        assert answer.get("outputs", [answer.get("output")]) == known["texts"]
        assert answer["prompt_tokens"] == len(known["tokens"])
        assert answer["completion_tokens"] == known["made"]
        assert answer["finish_reason"] in known["reasons"]


# ---- as vLLM's own entry points answer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("seed", {"sampling": {**RANDOM, "seed": 3}}),
        ("several", {"sampling": {**RANDOM, "seed": 3, "n": 3}}),
        ("stop", {"sampling": {**support.GREEDY, "max_tokens": 40, "stop": ["a", "it"]}}),
        *(
            (name, {"sampling": {**RANDOM, "seed": 5, "max_tokens": 40, "structured_outputs": constraint}})
            for name, constraint in CONSTRAINTS.items()
        ),
    ],
)
def test_sampling(folder: Path, engine: VllmEngine, reference: Reference, name: str, fields: dict[str, Any]) -> None:
    same(answers(engine, make_spec(**fields)), expected(folder, reference, name))


def test_parameters_from_columns(folder: Path, engine: VllmEngine, reference: Reference) -> None:
    batch = columns(
        text=PROMPTS,
        t=pa.array([0.0, 1.0, None, None], pa.float32()),
        s=pa.array([1.0, 7.0, 9.0, None]),  # as pandas writes whole numbers with nulls
        m=pa.array([None, None, 3, None], pa.int16()),
        stop=pa.array([None, None, None, ["a", "o"]]),
    )
    own = {"temperature": "t", "seed": "s", "max_tokens": "m", "stop": "stop"}
    spec = make_spec(sampling={**RANDOM, "seed": 11}, sampling_columns=own)
    same(answers(engine, spec, batch), expected(folder, reference, "own"))


def test_prompts_of_token_ids(folder: Path, engine: VllmEngine, reference: Reference) -> None:
    spec = make_spec(prompt=None, prompt_token_column="ids")
    same(answers(engine, spec, columns(ids=[[1, 300, 17], [44]])), expected(folder, reference, "tokens"))


def test_tools_and_template_arguments(folder: Path, engine: VllmEngine, reference: Reference) -> None:
    spec = make_spec("chat", column="talk", tools=TOOLS, chat_template_kwargs={"mood": "gay"})
    same(answers(engine, spec, columns(talk=[json.dumps(TALK)])), expected(folder, reference, "tools"))


def test_adapters(folder: Path, engine: VllmEngine, reference: Reference) -> None:
    """By name for every row, by column for each; next to each other in one batch, and next to the model alone."""
    red, blue, plain = (expected(folder, reference, name) for name in ("red", "blue", "plain"))
    assert len({answer["texts"][0] for answer in (red[0], blue[0], plain[0])}) == 3
    adapters = {"red": str(folder / "red"), "blue": str(folder / "blue")}
    same(answers(engine, make_spec(adapters={"any": adapters["red"]})), red)
    same(answers(engine, make_spec()), plain)
    names = ["red", "blue", None, "blue"]
    spec = make_spec(adapters=adapters, adapter_column="who")
    same(answers(engine, spec, columns(text=PROMPTS, who=names)), [red[0], blue[1], plain[2], blue[3]])


@pytest.mark.parametrize("name", ["logprobs", "wanted", "several"])
def test_log_probabilities(folder: Path, engine: VllmEngine, reference: Reference, name: str) -> None:
    asked = questions(folder)[name][2]
    found = answers(engine, make_spec(sampling=asked))
    wanted = expected(folder, reference, name)
    same(found, wanted)
    tokenizer = engine._loaded().running.llm.get_tokenizer()
    for answer, known in zip(found, wanted, strict=True):
        many = answer["logprobs"] if name == "several" else [answer["logprobs"]]
        assert len(many) == len(known["logprobs"])
        for tokens, came in zip(many, known["logprobs"], strict=True):
            assert [token["token_id"] for token in tokens] == [token for token, _ in came]
            for token, (_, probable) in zip(tokens, came, strict=True):
                assert token["logprob"] == pytest.approx(probable[str(token["token_id"])], abs=1e-3)
                top = token["top_logprobs"]
                if name == "wanted":
                    assert [item["token_id"] for item in top] == [5, 300]
                else:
                    assert len(top) == asked["logprobs"]
                    assert top == sorted(top, key=lambda item: -item["logprob"])
                    assert top[0]["logprob"] == pytest.approx(max(probable.values()), abs=1e-3)
        ids = [token["token_id"] for token in many[0]]
        text = (answer.get("outputs") or [answer.get("output")])[0]
        # vLLM leaves out the bytes at the end that are no character yet.
        assert tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd") == text.rstrip("\ufffd")


def test_log_probabilities_of_the_prompt(engine: VllmEngine) -> None:
    (answer,) = answers(engine, make_spec(sampling={**support.GREEDY, "prompt_logprobs": 0}), support.texts("x y"))
    found = answer["prompt_logprobs"]
    assert len(found) == answer["prompt_tokens"]
    assert found[0] is None
    assert all(token["logprob"] < 0 and token["top_logprobs"] == [] for token in found[1:])


# ---- answers that have to be of a form ------------------------------------------------------------------------------


def test_every_answer_keeps_to_the_schema(engine: VllmEngine) -> None:
    """Of a thousand rows of noise; max_tokens leaves room for the longest answer in the smallest tokens."""
    sampling = {"max_tokens": 32, "structured_outputs": {"json": SCHEMA}}
    found = answers(engine, make_spec(sampling=sampling), support.texts(*(f"row {row}" for row in range(1000))))
    assert len(found) == 1000
    values = [json.loads(answer["output"]) for answer in found]
    assert all(
        type(value.pop("positive")) is bool and value.pop("stars") in (1, 2, 3) and not value for value in values
    )
    assert len({answer["output"] for answer in found}) == 6


def test_an_answer_that_is_cut_off_is_a_row_error(engine: VllmEngine) -> None:
    """And one that is complete just when its tokens end is none."""
    for constraint, fits, short in [
        ({"regex": "[0-9]{20}"}, 20, 2),
        ({"choice": ["aaaa"]}, 4, 1),
        ({"json": SCHEMA}, 40, 4),
    ]:
        for most, failed in ((fits, False), (short, True)):
            sampling = {**RANDOM, "max_tokens": most, "structured_outputs": constraint}
            found = answers(engine, make_spec(sampling=sampling))
            assert [isinstance(answer, RowFailure) for answer in found] == [failed] * 4, (constraint, most, found)
            if failed:
                assert {answer.code for answer in found} == {RowErrorCode.INVALID_OUTPUT}
                assert any(word in found[0].message for word in ("cut off", "none of the choices"))


def test_the_tokens_of_invalid_answers_are_counted(engine: VllmEngine) -> None:
    spec = make_spec(sampling={**RANDOM, "max_tokens": 2, "structured_outputs": {"regex": "[0-9]{20}"}})
    found = list(engine.infer(spec, [columns(text=["a", "b", "c"])], Cancellation()))
    assert sum(len(batch.failures) for batch in found) == 3
    assert sum(batch.measured.get("completion_tokens", 0) for batch in found) == 6


def test_a_stop_string_breaks_the_form(engine: VllmEngine) -> None:
    sampling = {**RANDOM, "max_tokens": 40, "stop": ":", "structured_outputs": {"json": SCHEMA}}
    found = answers(engine, make_spec(sampling=sampling))
    assert [answer.code for answer in found] == [RowErrorCode.INVALID_OUTPUT] * 4


def test_schemas_from_a_column(engine: VllmEngine) -> None:
    """Each row keeps to its own; one that is no schema, or that vLLM cannot follow, is that row's error."""
    schemas = [
        '{"enum": ["left", "right"]}',
        None,
        "{",
        '{"type": 3}',
        '{"type": "object", "$ref": "http://x/y"}',
        "true",
    ]
    spec = make_spec(
        sampling={**RANDOM, "max_tokens": 40, "structured_outputs": {"choice": ["centre"]}},
        sampling_columns={"structured_outputs.json": "schema"},
    )
    found = answers(engine, spec, columns(text=["x"] * 6, schema=schemas))
    assert found[0]["output"] in ('"left"', '"right"')
    assert found[1]["output"] == "centre"
    for answer in found[2:]:
        assert isinstance(answer, RowFailure), answer
        assert answer.code == RowErrorCode.INVALID_VALUE, answer
    assert "column 'schema'" in found[2].message


# ---- rows that fail, and jobs that are refused ----------------------------------------------------------------------


def test_bad_values_fail_alone(engine: VllmEngine) -> None:
    spec = make_spec(sampling_columns={"temperature": "t", "max_tokens": "m"})
    batch = columns(text=["a"] * 5, t=[0.0, -1.0, 9.0, 0.0, None], m=[2.0, 2.0, 2.0, 2.5, None])
    found = answers(engine, spec, batch)
    assert found[0]["completion_tokens"] == 2
    assert [answer.code for answer in found[1:4]] == [RowErrorCode.INVALID_VALUE] * 3
    assert "column 't'" in found[1].message and "temperature" in found[2].message and "column 'm'" in found[3].message
    assert found[4]["completion_tokens"] == 12


def test_numbers_that_fit_into_no_message_fail_alone(engine: VllmEngine) -> None:
    """And leave nothing in vLLM, which notes a request before it packs it."""
    spec = make_spec(sampling_columns={"max_tokens": "m"})
    found = answers(engine, spec, columns(text=["a"] * 2, m=[2.0, 1e20]))
    assert found[0]["completion_tokens"] == 2
    assert found[1].code == RowErrorCode.INVALID_VALUE and "64 bits" in found[1].message
    assert engine._loaded().running.llm.get_num_unfinished_requests() == 0


def test_bad_tokens_fail_alone(engine: VllmEngine) -> None:
    ids = [[1, 5], [1, 10**6], [-1], [], None, [1, None], [1] * 400]
    found = answers(
        engine, make_spec(prompt=None, prompt_token_column="ids"), columns(ids=pa.array(ids, pa.list_(pa.int64())))
    )
    codes = [answer.code if isinstance(answer, RowFailure) else None for answer in found]
    bad = RowErrorCode.INVALID_VALUE
    assert codes == [None, bad, bad, bad, RowErrorCode.MISSING_VALUE, bad, RowErrorCode.PROMPT_TOO_LONG]
    cut = make_spec(prompt=None, prompt_token_column="ids", overlong="truncate")
    (whole,) = answers(engine, cut, columns(ids=[[1] * 400]))
    assert whole["prompt_tokens"] == support.CONTEXT - support.GREEDY["max_tokens"]


def test_an_unknown_adapter_fails_alone(folder: Path, engine: VllmEngine) -> None:
    spec = make_spec(adapters={"red": str(folder / "red")}, adapter_column="who")
    found = answers(engine, spec, columns(text=["a", "a"], who=["green", "red"]))
    assert found[0].code == RowErrorCode.INVALID_VALUE
    assert "no adapter 'green'; the job has red" in found[0].message
    assert found[1]["output"]


def test_an_adapter_that_vllm_cannot_load(folder: Path, engine: VllmEngine, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((folder / "red" / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(InvalidJob) as caught:
        answers(engine, make_spec(adapters={"broken": str(tmp_path)}))
    assert caught.value.field == "adapters.broken"
    assert answers(engine, make_spec(adapters={"red": str(folder / "red")}))[0]["output"]


def responses(engine: VllmEngine, task: str, *bodies: dict[str, Any]) -> list[Any]:
    """The bodies of the responses to requests; a failure in place of one."""
    spec = make_spec(task, request_column="body", prompt=None)
    rows = columns(body=[json.dumps({"model": "theirs", **body}) for body in bodies])
    found = run(answering(engine, spec), spec, [rows])  # type: ignore[arg-type]
    return [one if isinstance(one, RowFailure) else json.loads(one["response"]) for _, one in sorted(found.items())]


def test_requests_are_answered_as_rows_are_each_with_its_own_parameters(engine: VllmEngine) -> None:
    greedy = support.GREEDY
    plain = [one["output"] for one in answers(engine, make_spec(sampling=greedy))]
    several = answers(engine, make_spec(sampling={**RANDOM, "seed": 3, "n": 3}))[0]["outputs"]
    talk = columns(messages=[json.dumps(TALK)])
    asked = make_spec(
        "chat", prompt=None, column="messages", tools=TOOLS, chat_template_kwargs={"mood": "gay"}, sampling=greedy
    )
    told = answers(engine, asked, talk)[0]["output"]

    first, second, third, refused, tokens = responses(
        engine,
        "generate",
        {"prompt": PROMPTS, **greedy, "logprobs": 2},
        {"prompt": PROMPTS[0], **RANDOM, "seed": 3, "n": 3},
        {"prompt": PROMPTS[0], "response_format": {"type": "json_object"}, "seed": 5, "max_tokens": 2},
        {"prompt": PROMPTS[0], "frobnicate": 1},
        {"prompt": [[1, 300, 10**6]]},
    )
    assert [choice["text"] for choice in first["choices"]] == plain
    for choice in Completion.model_validate_json(json.dumps(first), strict=True).choices:
        assert choice.logprobs is not None
        # The token that begins a character in several bytes has no text of its own.
        assert len(choice.logprobs.tokens or []) == len(choice.logprobs.token_logprobs or []) == greedy["max_tokens"]
        # By text, which such tokens share.
        assert {len(top) for top in choice.logprobs.top_logprobs or []} <= {1, 2}
    assert [choice["text"] for choice in second["choices"]] == several
    assert third["choices"][0]["finish_reason"] == "length"
    assert refused.code == RowErrorCode.UNSUPPORTED_PARAMETER
    assert tokens.code == RowErrorCode.INVALID_VALUE

    own = {"tools": TOOLS, "chat_template_kwargs": {"mood": "gay"}, **greedy}
    named = {"type": "function", "function": {"name": "weigh"}}
    none, called, auto, unlimited = responses(
        engine,
        "chat",
        {"messages": TALK, "tool_choice": "none", **own},
        {"messages": TALK, "tool_choice": named, **own, "max_tokens": 40},
        {"messages": TALK, **own},
        {"messages": TALK[:1], "temperature": 0, "stop": ["a", "e", "i", "o", "u", " "]},
    )
    assert none["choices"][0]["message"]["content"] == told
    call = ChatCompletion.model_validate_json(json.dumps(called), strict=True).choices[0].message.tool_calls
    assert call is not None
    assert call[0].type == "function"
    assert isinstance(json.loads(call[0].function.arguments), dict)
    assert (auto.code, auto.message.partition(":")[0]) == (RowErrorCode.UNSUPPORTED_PARAMETER, "tools")
    assert unlimited["usage"]["completion_tokens"] >= 1


def test_a_batch_file_is_answered_as_run_batch_answers_it(folder: Path, engine: VllmEngine, tmp_path: Path) -> None:
    """``vllm run-batch`` has no completions, and embeddings only with a model that pools. Its module is started: the
    command asks for a distribution called vllm, which the CPU build is not."""
    greedy = {"model": str(folder / "llama"), **support.GREEDY}
    parts = [{"type": "text", "text": "Name a river."}]
    bodies = [
        *({"messages": [{"role": "user", "content": prompt}], **greedy} for prompt in PROMPTS),
        {"messages": TALK, "tools": TOOLS, "tool_choice": "none", **greedy},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}], **greedy},
        {"messages": TALK[:2], **greedy, "max_tokens": 40, "stop": ["a", "it"]},
        {"messages": TALK[:2], **greedy, "chat_template_kwargs": {"mood": "gay"}},
        {"messages": TALK[:2], **greedy, **RANDOM, "seed": 3, "n": 2},
    ]
    lines = [
        {"custom_id": str(row), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for row, body in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--dtype", "float32", "--max-model-len", str(support.CONTEXT), "--enforce-eager"]
    command = ["-i", "in.jsonl", "-o", "out.jsonl", "--model", greedy["model"], *options]
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", *command],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {line["custom_id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").open())}
    theirs = [found[str(row)]["response"]["body"] for row in range(len(bodies))]
    ours = responses(engine, "chat", *bodies)
    for body, own, known in zip(bodies, ours, theirs, strict=True):
        assert not isinstance(own, RowFailure), own
        assert [_said(choice) for choice in own["choices"]] == [_said(choice) for choice in known["choices"]], body
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [own["usage"][name] for name in counts] == [known["usage"][name] for name in counts], body


def _said(choice: dict[str, Any]) -> tuple[Any, ...]:
    return choice["index"], choice["message"]["role"], choice["message"]["content"], choice["finish_reason"]
