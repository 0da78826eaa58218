"""A row's result is its own: neither padding nor a neighbour changes it, and what is no number is no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from examples.tiny_encoder import build_encoder
from pipeline.engines import pooling
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.runtime import signature
from pipeline.engines.onnx.tensor import from_arrow, stacking_check
from storage.errors import InvalidInput, InvalidJob
from tests.engines.onnx.models.test_text import column
from tests.engines.onnx.support import FLOAT, INT64, embeddings, engine, graph, job, model_at, run, value

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
        *(
            helper.make_tensor(n, FLOAT, [], [x])
            for n, x in {"zero": 0.0, "one": 1.0, "four": 4.0, "nan": float("nan")}.items()
        ),
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


def positives(path: Path, *, out: Any) -> Path:
    """The numbers above zero, of all rows one after the other: x float[N, 3] → y float[out]."""
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["all"]),
        helper.make_node("Greater", ["all", "zero"], ["keep"]),
        helper.make_node("Compress", ["all", "keep"], ["y"], axis=0),
    ]
    constants = [helper.make_tensor("flat", INT64, [1], [-1]), helper.make_tensor("zero", FLOAT, [], [0.0])]
    return graph(path, nodes, [value("x", FLOAT, ["N", 3])], [value("y", FLOAT, [out])], constants)


def triples(rows: list[list[float]]) -> pa.RecordBatch:
    return pa.record_batch({"x": pa.array(rows, pa.list_(pa.float32(), 3))})


def test_an_output_that_calls_its_first_axis_otherwise_is_stacked_where_rows_are_its_items(tmp_path: Path) -> None:
    path = positives(tmp_path / "named.onnx", out="K")
    assert (mode := signature.of_file(path)) is not None
    assert signature.row_mode(mode, "auto") == "whole" and signature.row_mode(mode, "stack") == "stack"
    rows, model = triples([[1.0, 2.0, -1.0], [3.0, -1.0, -1.0]]), model_at(path)
    assert OnnxEngine.check(SPEC, model, rows.schema) == ("x",)
    assert OnnxEngine.settle(SPEC, model, rows.schema) == {"row_mode": "stack"}
    made = engine(path, SPEC, tmp_path, row_mode="stack")
    with pytest.raises(InvalidJob, match="does not count rows; set it to 'whole'"):  # stacking is tried, not believed
        run(made, SPEC, rows)
    made.close()
    whole = pa.schema([pa.field("x", pa.list_(pa.list_(pa.float32(), 3)))])
    assert OnnxEngine.settle(SPEC, model, whole) == {}
    with pytest.raises(InvalidInput, match=r"wants \[N, 3\]; a row of the table is a whole input .* 'stack'"):
        OnnxEngine.check(SPEC, model, pa.schema([pa.field("x", pa.float32())]))


@pytest.mark.parametrize("axes", [["N", 3, "?", "?"], ["?", 3, "?", "?"], ["d", 3, "d", "d"], ["-1", 3, "-1", "None"]])
def test_axes_without_a_name_or_with_one_for_all_need_not_be_equal(tmp_path: Path, axes: list[Any]) -> None:
    nodes = [helper.make_node("Abs", ["x"], ["y"])]
    path = graph(tmp_path / "g.onnx", nodes, [value("x", FLOAT, axes)], [value("y", FLOAT, axes)])
    x = -np.arange(144, dtype=np.float32).reshape(2, 3, 4, 6)
    columns = pa.record_batch({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(x)})
    assert OnnxEngine.check(SPEC, model_at(path), columns.schema) == ("x",)
    made = engine(path, SPEC, tmp_path)
    table, failures = run(made, SPEC, columns)
    made.close()
    assert not failures and np.array_equal(table.column("y").to_pylist(), -x)


def test_tensors_that_no_two_readers_turn_alike_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    path = graph(tmp_path / "g.onnx", nodes, [value("x", FLOAT, ["N", 3, 3, 3])], [value("y", FLOAT, ["N", 3, 3, 3])])
    pictures = np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3)
    for order, fits in (((0, 3, 1, 2), False), ((0, 2, 3, 1), False), ((0, 1, 3, 2), True), ((0, 1, 2, 3), True)):
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(pictures.transpose(order))
        columns = pa.record_batch({"x": column})
        if not fits:
            with pytest.raises(InvalidInput, match=r"column 'x' is .*permutation.*\.copy\(\)"):
                OnnxEngine.check(SPEC, model_at(path), columns.schema)
            continue
        assert OnnxEngine.check(SPEC, model_at(path), columns.schema) == ("x",)
        made = engine(path, SPEC, tmp_path)
        table, _ = run(made, SPEC, columns)
        made.close()
        found: Any = table.column("y").combine_chunks()
        assert np.array_equal(found.to_numpy_ndarray(), pictures.transpose(order))


def test_rows_that_change_each_other_later_only_are_found_out(tmp_path: Path) -> None:
    """Each row of the first batch has one positive number; in the second, the first has two and the last none."""
    path = positives(tmp_path / "unnamed.onnx", out=None)
    rows = [[float(i + 1), -1.0, -1.0] for i in range(8)]
    rows += [[100.0, 101.0, -1.0], *[[200.0 + i, -1.0, -1.0] for i in range(6)], [-1.0, -1.0, -1.0]]
    made = engine(path, SPEC, tmp_path, max_batch=8, lanes=1)
    with pytest.raises(InvalidJob, match="does not count rows"):  # a row alone gives two numbers, or none
        run(made, SPEC, triples(rows), size=8)
    made.close()


def centred(path: Path) -> Path:
    """x minus its mean over all rows."""
    axes = helper.make_tensor("axes", INT64, [1], [0])
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    return graph(path, nodes, [value("x", FLOAT, ["N"])], [value("y", FLOAT, ["N"])], [axes])


@pytest.mark.parametrize(
    "first", [[np.nan, 1.0, 2.0, np.nan], [3.0] * 4, [np.inf] * 4], ids=["nan", "equal", "infinite"]
)
def test_a_first_batch_that_proves_nothing_is_no_proof(tmp_path: Path, first: list[float]) -> None:
    made = engine(centred(tmp_path / "centred.onnx"), SPEC, tmp_path, max_batch=4, lanes=1)
    x = [*first, 4.0, 5.0, 6.0, 9.0]
    table, _ = run(made, SPEC, pa.record_batch({"x": pa.array(x, pa.float32())}), size=4)
    stats = made.stats()
    made.close()
    expected = [0.0 if np.isfinite(number) else np.nan for number in x]
    assert np.array_equal(np.array(table.column("y").to_pylist()), expected, equal_nan=True)
    assert not stats["stacked"]


def test_rows_without_a_number_do_not_hide_that_the_others_may_be_stacked(tmp_path: Path) -> None:
    path = graph(
        tmp_path / "twice.onnx",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [value("x", FLOAT, ["N"])],
        [value("y", FLOAT, ["N"])],
    )
    made = engine(path, SPEC, tmp_path)
    table, _ = run(made, SPEC, pa.record_batch({"x": pa.array([np.nan, 1.0, 2.0, np.nan], pa.float32())}))
    stats = made.stats()
    made.close()
    assert stats["stacked"] and stats["stacked_rows"] == 4
    assert table.column("y").to_pylist()[1:3] == [2.0, 4.0]


def test_every_new_shape_and_some_later_batches_are_looked_at_again() -> None:
    doubt = stacking_check.SpotCheck()
    assert all(doubt.row([("x", size)], 10) for size in range(50))  # shapes never seen
    looked = [at for _ in range(1600) for at in doubt.row([("x", 0)], 10)]
    assert 50 < len(looked) < 200 and set(looked) == set(range(10))


@given(st.lists(st.sampled_from([0.0, 1.0, float("nan"), float("inf")]), min_size=1, max_size=8))
def test_the_rows_compared_differ_if_any_do(numbers: list[float]) -> None:
    found = stacking_check.pick_probe_rows([np.array(numbers, np.float32)])
    finite = [number for number in numbers if np.isfinite(number)]
    if len(set(finite)) > 1:
        assert len(found) == 2 and len({numbers[at] for at in found} & set(finite)) == 2
    elif len(finite) > 1 or len(numbers) == 1:
        assert len(found) == 1


@pytest.mark.parametrize(
    ("shape", "data", "code", "says"),
    [
        ([1] * 65, [1.0], "wrong_shape", "65 axes"),
        ([1] * 5000, [1.0], "wrong_shape", "5000 axes"),
        ([0, 2**62], [], "invalid_value", "no memory holds"),
        ([0, 2**50, 2**50], [], "invalid_value", "no memory holds"),
    ],
    ids=["axes", "many", "large", "larger"],
)
def test_a_shape_that_no_array_has_fails_its_row_only(
    tmp_path: Path, shape: list[int], data: list[float], code: str, says: str
) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    path = graph(tmp_path / "any.onnx", nodes, [value("x", FLOAT, None)], [value("y", FLOAT, None)])
    kind = pa.struct({"shape": pa.list_(pa.int64()), "data": pa.list_(pa.float32())})
    rows = [{"shape": [2], "data": [1.0, 2.0]}, {"shape": shape, "data": data}, {"shape": [], "data": [3.0]}]
    made = engine(path, SPEC, tmp_path)
    table, failures = run(made, SPEC, pa.record_batch({"x": pa.array(rows, kind)}))
    made.close()
    assert list(failures) == [1] and failures[1].code == code and says in failures[1].message
    assert [row["data"] for row in table.column("y").to_pylist()] == [[1.0, 2.0], [3.0]]


def test_the_width_of_a_column_of_shapes_is_bounded() -> None:
    """A row that claims a million axes would take as many sizes for every other row."""
    kind = pa.struct({"shape": pa.list_(pa.int64()), "data": pa.list_(pa.float32())})
    rows = [{"shape": [1] * 1_000_000, "data": [1.0]}, *[{"shape": [1], "data": [1.0]}] * 3]
    found = from_arrow.read(pa.array(rows, kind), None, "x")
    assert found.shapes.shape == (4, 1) and list(found.failures) == [0]


def test_a_graph_too_large_to_parse_names_the_column_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature, "READ_LIMIT", 0)
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    inputs = [value("a", FLOAT, ["N"]), value("b", FLOAT, ["N"])]
    path = graph(tmp_path / "large.onnx", nodes, inputs, [value("y", FLOAT, ["N"])])
    spec = job("tensor", inputs={"b": "bee"})
    columns = pa.record_batch({"a": pa.array([1.0, 2.0], pa.float32()), "bee": pa.array([3.0, 5.0], pa.float32())})
    assert OnnxEngine.check(spec, model_at(path), columns.schema) == ("a", "bee")
    with pytest.raises(InvalidInput, match="the input has no column 'bee'"):
        OnnxEngine.check(spec, model_at(path), columns.select(["a"]).schema)
    made = engine(path, spec, tmp_path)
    table, _ = run(made, spec, columns)
    assert table.column("y").to_pylist() == [4.0, 7.0]
    with pytest.raises(InvalidInput, match=r"inputs.a: the input has no column 'a', which the graph wants as a: float"):
        run(made, spec, columns.select(["bee"]))
    made.close()
