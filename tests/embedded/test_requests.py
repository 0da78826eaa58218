"""Jobs whose rows are requests of OpenAI's API, from batch files and from columns, in this process."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import helper, numpy_helper
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pipeline import Client
from pipeline.engines import registry
from pipeline.requests import job
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidInput, InvalidJob
from storage.states import JobState
from tests.engines.onnx.support import FLOAT, INT64, graph, value

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def line(name: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    if url == CHAT:
        body = {"messages": [{"role": "user", "content": f"hi {name}"}]} | body
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "theirs", **body}}


def batch_file(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


def rows(out: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(file) for file in sorted((out / "data").glob("*.parquet"))]
    return pa.concat_tables(tables).to_pylist()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def test_a_batch_file_is_answered_line_by_line_each_with_its_own_parameters(client: Client, tmp_path: Path) -> None:
    source = batch_file(
        tmp_path / "batch.jsonl",
        line("a", metadata={}),
        line("b", n=2, max_tokens=2, user="somebody"),
        line("c", logit_bias={"1": 1}),
        line("d", stop="hi"),
        line("e", messages=[{"role": "user", "content": [{"type": "text", "text": "parts"}]}]),
        line("f", messages="none"),
        line("g", tools=[{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]),
    )
    out = tmp_path / "out"
    done = client.run(input=source, output=str(out), model="fake", openai_lines=True, shard_rows=3)
    assert done.state is JobState.COMPLETED
    found = {row["custom_id"]: row for row in rows(out)}
    assert list(found) == list("abcdefg")
    errors = {name: row["error"]["code"] for name, row in found.items() if row["error"]}
    assert errors == {"c": "unsupported_parameter", "f": "invalid_value"}
    responses = {
        name: ChatCompletion.model_validate_json(row["response"], strict=True)
        for name, row in found.items()
        if row["error"] is None
    }
    assert {response.model for response in responses.values()} == {"theirs"}
    for name, response in responses.items():
        assert response.usage is not None
        assert response.choices[0].message.content == found[name]["output"]
        assert response.usage.completion_tokens == found[name]["completion_tokens"]
    assert [(choice.index, choice.finish_reason) for choice in responses["b"].choices] == [(0, "length"), (1, "length")]
    assert "hi" not in (found["d"]["output"] or "hi")
    assert "parts" in found["e"]["output"]
    # What came in stays as it was, to the byte.
    assert json.loads(found["g"]["body"])["tools"][0]["function"]["parameters"] == {"default": None}

    answered, failed = lines_of(out / "openai/output.jsonl"), lines_of(out / "openai/errors.jsonl")
    assert [each["custom_id"] for each in answered] == list("abdeg")
    assert [each["custom_id"] for each in failed] == ["c", "f"]
    assert all(each["error"] is None and each["response"]["status_code"] == 200 for each in answered)
    assert [each["response"]["body"] for each in answered] == [json.loads(found[name]["response"]) for name in "abdeg"]
    assert failed[0]["error"]["code"] == "unsupported_parameter"
    assert failed[0]["response"]["body"]["error"]["param"] == "logit_bias"
    assert len({each["id"] for each in (*answered, *failed)}) == 7


def test_lists_of_prompts_and_inputs_are_one_response_each(client: Client, tmp_path: Path) -> None:
    prompts = [line("a", COMPLETIONS, prompt=["one", "two"], n=2), line("b", COMPLETIONS, prompt=[1, 2, 3])]
    source = batch_file(tmp_path / "prompts.jsonl", *prompts)
    client.run(input=source, output=str(tmp_path / "completions"), model="fake", engine_options={"shuffle": True})
    first, second = (
        Completion.model_validate_json(row["response"], strict=True) for row in rows(tmp_path / "completions")
    )
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert [choice.text.split()[-1] for choice in first.choices] == ["one", "one", "two", "two"]
    assert second.choices[0].text.endswith("1 2 3")

    inputs = [
        line("a", EMBEDDINGS, input="one"),
        line("b", EMBEDDINGS, input=["two", "one"], encoding_format="base64"),
        line("c", EMBEDDINGS, input="one", dimensions=2),
        line("d", EMBEDDINGS, input="one", dimensions=9),
        line("e", EMBEDDINGS, input=[1, 2]),
    ]
    source = batch_file(tmp_path / "inputs.jsonl", *inputs)
    client.run(input=source, output=str(tmp_path / "embedded"), model="fake", engine_options={"shuffle": True})
    one, two, short, *refused = rows(tmp_path / "embedded")
    assert [row["error"]["code"] for row in refused] == ["invalid_value", "unsupported_parameter"]
    bodies = [CreateEmbeddingResponse.model_validate_json(one["response"], strict=True), json.loads(two["response"])]
    assert bodies[0].data[0].embedding == pytest.approx(one["embedding"])
    assert [item["index"] for item in bodies[1]["data"]] == [0, 1]
    packed = np.frombuffer(base64.b64decode(bodies[1]["data"][1]["embedding"]), "<f4")
    assert packed.tolist() == one["embedding"]
    assert two["embedding"] is None
    assert bodies[1]["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert len(short["embedding"]) == 2
    assert np.linalg.norm(short["embedding"]) == pytest.approx(1)


def tiny_encoder(folder: Path) -> str:
    """A graph that looks up a vector for each token of at most 8, and the tokenizer beside it."""
    words = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "one", "two", "three", "words", "here", "word"])}
    table = np.random.default_rng(0).standard_normal((len(words), 6)).astype(np.float32)
    path = graph(
        folder / "model.onnx",
        [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])],
        [value("input_ids", INT64, ["n", "s"])],
        [value("last_hidden_state", FLOAT, ["n", "s", table.shape[1]])],
        [numpy_helper.from_array(table, "table")],
    )
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8}))
    return str(path)


def test_an_encoder_embeds_each_input_as_it_does_a_row(client: Client, tmp_path: Path) -> None:
    """On ONNX Runtime: the vectors of a column of texts, request by request; what does not fit fails its own."""
    texts = ["one", "two words", "three words here"]
    model = tiny_encoder(tmp_path / "model")
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    job: dict[str, Any] = {"model": model, "task": "embed", "pooling": "mean", "normalize": True}
    client.run(input=str(tmp_path / "texts.parquet"), output=str(tmp_path / "plain"), column="text", **job)
    wanted = rows(tmp_path / "plain")
    vectors = np.array([row["embedding"] for row in wanted], np.float32)
    too_long = "word " * 50
    source = batch_file(
        tmp_path / "inputs.jsonl",
        line("a", EMBEDDINGS, input=texts[0]),
        line("b", EMBEDDINGS, input=texts[::-1], encoding_format="base64"),
        line("c", EMBEDDINGS, input=texts[1], dimensions=4),
        line("d", EMBEDDINGS, input=[texts[2], too_long]),
        line("e", EMBEDDINGS, input=""),
        line("f", EMBEDDINGS, input=texts[1], dimensions=10_000),
    )
    for overlong, failing in {"error": "def", "truncate": "ef"}.items():
        out = tmp_path / overlong
        done = client.run(input=source, output=str(out), openai_lines=True, overlong=overlong, shard_rows=4, **job)
        assert done.rows_failed == len(failing)
        found = {row["custom_id"]: row for row in rows(out)}
        assert [name for name, row in found.items() if row["error"]] == list(failing)
        assert [each["custom_id"] for each in lines_of(out / "openai/errors.jsonl")] == list(failing)
        bodies = {name: json.loads(row["response"]) for name, row in found.items() if not row["error"]}
        single = CreateEmbeddingResponse.model_validate(bodies["a"])
        assert single.data[0].embedding == pytest.approx(vectors[0], abs=1e-6)
        assert single.usage.prompt_tokens == wanted[0]["prompt_tokens"]
        assert found["a"]["embedding"] == pytest.approx(vectors[0], abs=1e-6)
        packed = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in bodies["b"]["data"]]
        assert np.stack(packed) == pytest.approx(vectors[::-1], abs=1e-6)
        assert bodies["b"]["usage"]["total_tokens"] == sum(row["prompt_tokens"] for row in wanted)
        short = vectors[1, :4] / np.linalg.norm(vectors[1, :4])
        assert found["c"]["embedding"] == pytest.approx(short, abs=1e-6)
        if overlong == "truncate":
            assert bodies["d"]["usage"]["prompt_tokens"] == wanted[2]["prompt_tokens"] + 8


@pytest.mark.parametrize("kind", ["text", "bytes", "struct", "json", "dictionary"])
def test_a_column_of_requests(client: Client, tmp_path: Path, kind: str) -> None:
    bodies = [line("a")["body"], line("b", max_tokens=1)["body"]]
    texts = pa.array([json.dumps(body) for body in bodies])
    column: Any = {
        "text": texts,
        "bytes": texts.cast(pa.binary()),
        "struct": pa.array(bodies),
        "json": pa.ExtensionArray.from_storage(pa.json_(pa.string()), texts),
        "dictionary": texts.dictionary_encode(),
    }[kind]
    pq.write_table(pa.table({"request": column}), tmp_path / "in.parquet")
    fields = {"input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out"), "model": "fake", "task": "chat"}
    client.run(**fields, request_column="request")
    first, second = rows(tmp_path / "out")
    assert "hi a" in first["output"]
    assert second["finish_reason"] == "length"
    assert first["error"] is second["error"] is None


def test_rows_that_hold_no_request_fail_alone(client: Client, tmp_path: Path) -> None:
    values = [None, b"\xff", b"{", b"3", json.dumps(line("a")["body"]).encode()]
    pq.write_table(pa.table({"request": pa.array(values, pa.binary())}), tmp_path / "in.parquet")
    fields = {"input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out"), "model": "fake"}
    client.run(**fields, endpoint=CHAT, request_column="request")
    codes = [row["error"] and row["error"]["code"] for row in rows(tmp_path / "out")]
    assert codes == ["missing_value", "invalid_utf8", "invalid_value", "invalid_value", None]


def test_a_failed_prompt_fails_its_request_once(client: Client, tmp_path: Path) -> None:
    source = batch_file(
        tmp_path / "in.jsonl",
        line("a", COMPLETIONS, prompt=["bad", "bad too", "good"]),
        line("b", COMPLETIONS, prompt="good"),
    )
    options = {"fail_rows_matching": "bad"}
    client.run(input=source, output=str(tmp_path / "out"), model="fake", engine_options=options)
    first, second = rows(tmp_path / "out")
    assert first["error"]["code"] == "engine_refused"
    assert second["error"] is None


def test_a_crash_in_between_loses_no_request(client: Client, tmp_path: Path) -> None:
    """The engine dies under the first batches; the requests that were inside are answered by the next attempt."""
    lines = [line(f"r{n}", COMPLETIONS, prompt=[f"a{n}", f"b{n}"]) for n in range(40)]
    source = batch_file(tmp_path / "in.jsonl", *lines)
    (tmp_path / "counts").mkdir()
    options = {"die_on": "a25", "die_times": 1, "counts_dir": str(tmp_path / "counts")}
    done = client.run(input=source, output=str(tmp_path / "out"), model="fake", engine_options=options, shard_rows=10)
    assert done.rows_failed == 0
    for n, row in enumerate(rows(tmp_path / "out")):
        texts = [choice.text.split()[-1] for choice in Completion.model_validate_json(row["response"]).choices]
        assert (row["custom_id"], texts) == (f"r{n}", [f"a{n}", f"b{n}"])


def test_a_batch_file_with_a_bad_line_is_refused_with_its_number(client: Client, tmp_path: Path) -> None:
    bad = line("b") | {"url": "/v1/frobnicate"}
    source = batch_file(tmp_path / "in.jsonl", line("a"), bad, line("a"), line("c", model="other"))
    with pytest.raises(InvalidInput, match=r"line 2: .*invalid_url.*line 3: .*duplicate_custom_id.*line 4: .*mismatch"):
        client.run(input=source, output=str(tmp_path / "out"), model="fake")
    assert not (tmp_path / "out/data").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "embed"}, r"task: .*/v1/chat/completions"),
        ({"request_column": "body", "task": "chat", "endpoint": EMBEDDINGS}, "task 'embed'"),
        ({"request_column": "bodies", "task": "chat"}, r"request_column: .*bodies"),
        ({"request_column": "custom_id", "task": "classify"}, "not by 'classify'"),
        ({"request_column": "body", "task": "chat", "column": "body"}, "exclude each other"),
        ({"sampling": {"n": 2}}, "each request says n"),
        ({"order": "prefix"}, "order"),
        ({"keep_columns": ["body"], "openai_lines": True}, "custom_id"),
        ({"task": "generate", "prompt": "{custom_id}", "openai_lines": True}, "openai_lines"),
    ],
)
def test_what_does_not_go_with_requests_is_refused(
    client: Client, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    source = batch_file(tmp_path / "in.jsonl", line("a"))
    with pytest.raises(InvalidJob, match=message):
        client.run(input=source, output=str(tmp_path / "out"), model="fake", **fields)


def test_without_a_task_other_input_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InvalidJob, match="task"):
        client.run(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"), model="fake")


def test_an_engine_that_answers_no_requests_says_so() -> None:
    spec = JobSpec(input=("-",), output="-", model="-", task=Task.CHAT, request_column="body")
    with pytest.raises(InvalidJob, match=r"does not answer requests of .*; 'vllm' does"):
        job.honoured(registry.engine_class("onnx"), spec)
