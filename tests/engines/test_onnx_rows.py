"""A row's result is its own: neither padding nor a neighbour changes it, and what is no number is no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import helper, numpy_helper

from examples.tiny_encoder import build_encoder
from pipeline.engines import pooling
from storage.errors import InvalidJob
from tests.engines.onnx_support import FLOAT, INT64, embeddings, engine, graph, job, run, value
from tests.engines.test_onnx_text import column

SPEC = job("tensor")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (build_encoder(tmp_path_factory.mktemp("encoder") / "tiny") / "tokenizer.json").read_bytes()


def table_of(width: int = 4) -> onnx.TensorProto:
    data = np.random.default_rng(0).normal(size=(2000, width)).astype(np.float32)
    return numpy_helper.from_array(data, "table")


def without_a_mask(folder: Path, tokenizer: bytes, length: int | str = "s") -> Path:
    """Ids alone: the mean of their vectors, padding's included."""
    axes = helper.make_tensor("axes", INT64, [1], [1])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["states"]),
        helper.make_node("ReduceMean", ["states", "axes"], ["sentence_embedding"], keepdims=0),
    ]
    outputs = [value("sentence_embedding", FLOAT, ["n", 4])]
    graph(folder / "model.onnx", nodes, [value("input_ids", INT64, ["n", length])], outputs, [table_of(), axes])
    (folder / "tokenizer.json").write_bytes(tokenizer)
    return folder


def test_without_a_mask_texts_of_unequal_length_are_not_padded_to_one(tmp_path: Path, tokenizer: bytes) -> None:
    path = without_a_mask(tmp_path / "bare", tokenizer)
    spec, texts = job("embed"), ["the", "the red fox", "red", "the quick brown fox jumps"]
    made = engine(path, spec, tmp_path)
    together, _ = run(made, spec, column(texts))
    alone = [embeddings(run(made, spec, column([text]))[0])[0] for text in texts]
    runs = made.stats()["runs"]
    made.close()
    assert np.array_equal(embeddings(together), np.stack(alone))
    assert runs == 3 + len(texts)  # those of equal length still share a batch


def test_a_fixed_length_without_a_mask_is_told(tmp_path: Path, tokenizer: bytes) -> None:
    said: list[str] = []
    engine(without_a_mask(tmp_path / "fixed", tokenizer, 12), job("embed"), tmp_path, said).close()
    assert any("12 tokens and no attention_mask" in message for message in said)


def both(folder: Path, tokenizer: bytes) -> Path:
    """Token states, and a sentence embedding that no pooling of them gives."""
    axes = helper.make_tensor("axes", INT64, [1], [1])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["token_embeddings"]),
        helper.make_node("ReduceSum", ["token_embeddings", "axes"], ["sentence_embedding"], keepdims=0),
    ]
    outputs = [value("token_embeddings", FLOAT, ["n", "s", 4]), value("sentence_embedding", FLOAT, ["n", 4])]
    inputs = [value("input_ids", INT64, ["n", "s"])]
    graph(folder / "model.onnx", nodes, inputs, outputs, [table_of(), axes])
    (folder / "tokenizer.json").write_bytes(tokenizer)
    return folder


def test_a_graphs_own_embedding_is_taken_unless_the_job_says_how_to_pool(tmp_path: Path, tokenizer: bytes) -> None:
    path = both(tmp_path / "both", tokenizer)
    made = engine(path, job("embed"), tmp_path)
    own, _ = run(made, job("embed"), column(["the red fox"]))
    mean, _ = run(made, job("embed", pooling="mean"), column(["the red fox"]))
    output = made.stats()["output"]
    made.close()
    assert output == "sentence_embedding"
    assert np.allclose(embeddings(own), embeddings(mean) * own.column("prompt_tokens")[0].as_py(), rtol=1e-5)


def blown(folder: Path, tokenizer: bytes, output: str) -> Path:
    """Embeddings or logits that are inf - inf for texts of more than four tokens."""
    axes = helper.make_tensor("axes", INT64, [2], [1, 2])
    nodes = [
        helper.make_node("Unsqueeze", ["input_ids", "last"], ["ids"]),
        helper.make_node("Cast", ["ids"], ["floats"], to=FLOAT),
        helper.make_node("Mul", ["floats", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "one"], ["ones"]),
        helper.make_node("ReduceSum", ["ones", "axes"], ["count"], keepdims=0),  # [n]
        helper.make_node("Greater", ["count", "four"], ["many"]),
        helper.make_node("Where", ["many", "nan", "count"], ["number"]),
        helper.make_node("Unsqueeze", ["number", "back"], ["column"]),
        helper.make_node("Concat", ["column", "column"], [output], axis=1),
    ]
    constants = [
        helper.make_tensor("last", INT64, [1], [2]),
        helper.make_tensor("back", INT64, [1], [1]),
        axes,
        *(helper.make_tensor(n, FLOAT, [], [x]) for n, x in dict(zero=0.0, one=1.0, four=4.0, nan=float("nan")).items()),
    ]
    inputs = [value("input_ids", INT64, ["n", "s"])]
    graph(folder / "model.onnx", nodes, inputs, [value(output, FLOAT, ["n", 2])], constants)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    return folder


@pytest.mark.parametrize(
    ("output", "spec"),
    [
        ("sentence_embedding", job("embed")),
        ("sentence_embedding", job("embed", embedding_type="binary")),
        ("sentence_embedding", job("embed", embedding_type="int8", normalize=True)),
        ("logits", job("classify")),
    ],
    ids=["float", "binary", "int8", "classify"],
)
def test_what_is_no_number_is_that_rows_error(tmp_path: Path, tokenizer: bytes, output: str, spec: Any) -> None:
    path = blown(tmp_path / "blown", tokenizer, output)
    made = engine(path, spec, tmp_path)
    table, failures = run(made, spec, column(["the", "the red fox jumps over", "the red fox jumps over", "red"]))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == {1: "not_finite", 2: "not_finite"}
    assert table.num_rows == 2


def test_vectors_whose_squares_overflow_have_unit_length() -> None:
    unit = pooling.unit_length(np.full((1, 4), 1e30, np.float32))
    assert unit.dtype == np.float32 and np.allclose(unit, 0.5)
