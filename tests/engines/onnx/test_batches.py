"""Batches that a graph fixes, batches that memory does not hold, and graphs whose values need a detour."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import PIL.Image
import pyarrow as pa
import pytest
from onnx import TensorProto, helper

from examples.tiny_encoder import build_encoder
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.runtime import low_precision
from storage.errors import InvalidInput, InvalidJob, InvalidModel
from tests.engines.onnx.models.test_text import column
from tests.engines.onnx.support import (
    BOOL,
    FLOAT,
    INT64,
    STRING,
    embeddings,
    engine,
    graph,
    job,
    model_at,
    run,
    value,
    vectors,
)

SPEC = job("tensor")
STACK = {"row_mode": "stack"}


def plain(path: Path, feed: dict[str, Any]) -> list[Any]:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def lists(data: np.ndarray[Any, Any]) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(data.reshape(-1)), data.shape[1])


def by_fours(path: Path) -> Path:
    """x float[4, 3] → y float[4, 2], each line by itself."""
    weights = helper.make_tensor("w", FLOAT, [3, 2], [1.0, -2.0, 0.5, 3.0, 0.25, -1.0])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["y"], axis=1)]
    return graph(path, nodes, [value("x", FLOAT, [4, 3])], [value("y", FLOAT, [4, 2])], [weights])


@pytest.mark.parametrize("n", [1, 4, 10])
def test_rows_run_in_the_batches_that_the_graph_fixes(tmp_path: Path, n: int) -> None:
    path = by_fours(tmp_path / "fours.onnx")
    data = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    spec = job("tensor", engine_options=STACK)
    columns = pa.record_batch({"x": lists(data)})
    assert OnnxEngine.check(spec, model_at(path), columns.schema) == ("x",)
    made = engine(path, spec, tmp_path, **STACK)
    table, failures = run(made, spec, columns)
    stats = made.stats()
    made.close()
    assert not failures and stats["row_mode"] == "stack"
    padded = np.concatenate([data, np.repeat(data[-1:], -n % 4, axis=0)])
    expected = np.concatenate([plain(path, {"x": padded[at : at + 4]})[0] for at in range(0, n, 4)])[:n]
    assert vectors(table.column("y")).tobytes() == expected.tobytes()


def test_without_being_told_the_columns_say_what_a_row_is(tmp_path: Path) -> None:
    model = model_at(by_fours(tmp_path / "fours.onnx"))
    row, whole = pa.list_(pa.float32(), 3), pa.list_(pa.list_(pa.float32(), 3), 4)
    for kind, options in ((row, STACK), (pa.list_(pa.float32()), STACK), (whole, {})):
        schema = pa.schema([pa.field("x", kind)])
        assert OnnxEngine.check(SPEC, model, schema) == ("x",)
        assert OnnxEngine.settle(SPEC, model, schema) == options
    with pytest.raises(InvalidInput, match=r"holds float32\[5\] per row; .* wants \[4, 3\]; .* 'stack'"):
        OnnxEngine.check(SPEC, model, pa.schema([pa.field("x", pa.list_(pa.float32(), 5))]))
    with pytest.raises(InvalidModel, match="dynamic or of one size"):
        other = graph(
            tmp_path / "other.onnx",
            [helper.make_node("ReduceSum", ["x"], ["y"])],
            [value("x", FLOAT, [4, 3])],
            [value("y", FLOAT, [1, 1])],
        )
        OnnxEngine.check(job("tensor", engine_options=STACK), model_at(other), pa.schema([pa.field("x", pa.float32())]))


def test_bad_rows_of_a_fixed_batch_fail_alone(tmp_path: Path) -> None:
    path = graph(
        tmp_path / "gather.onnx",
        [helper.make_node("Add", ["x", "zero"], ["i"]), helper.make_node("Gather", ["table", "i"], ["y"])],
        [value("x", INT64, [4])],
        [value("y", FLOAT, [4])],
        [helper.make_tensor("table", FLOAT, [3], [0.0, 10.0, 20.0]), helper.make_tensor("zero", INT64, [], [0])],
    )
    made = engine(path, SPEC, tmp_path, **STACK)
    table, failures = run(made, SPEC, pa.record_batch({"x": pa.array([1, 2, 99, 0, None, 2, 1, -50, 1], pa.int64())}))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == {
        2: "engine_refused",
        4: "missing_value",
        7: "engine_refused",
    }
    assert table.column("y").to_pylist() == [10.0, 20.0, 0.0, 20.0, 10.0, 10.0]


def test_rows_that_change_each_other_in_a_fixed_batch_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=0)]
    path = graph(tmp_path / "softmax.onnx", nodes, [value("x", FLOAT, [4, 2])], [value("y", FLOAT, [4, 2])])
    made = engine(path, SPEC, tmp_path, **STACK)
    with pytest.raises(InvalidJob, match=r"row_mode: rows change each other's result in the graph's batches of 4"):
        run(made, SPEC, pa.record_batch({"x": lists(np.arange(8, dtype=np.float32).reshape(4, 2))}))
    made.close()


@pytest.mark.parametrize("batch", [1, 4, "n"])
def test_images_in_the_batches_that_the_graph_fixes(tmp_path: Path, batch: Any) -> None:
    folder = tmp_path / "means"
    nodes = [helper.make_node("ReduceMean", ["pixel_values", "axes"], ["logits"], keepdims=0)]
    axes = helper.make_tensor("axes", INT64, [2], [2, 3])
    inputs = [value("pixel_values", FLOAT, [batch, 3, 8, 8])]
    graph(folder / "model.onnx", nodes, inputs, [value("logits", FLOAT, [batch, 3])], [axes])
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "red", "1": "green", "2": "blue"}}))
    recipe = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    encoded: list[bytes | None] = []
    for at in range(10):
        file = io.BytesIO()
        PIL.Image.new("RGB", (9, 7), colours[at % 3]).save(file, "PNG")
        encoded.append(file.getvalue())
    encoded[4], encoded[6] = b"no image", None
    spec = job("classify", column="image")
    made = engine(folder, spec, tmp_path)
    table, failures = run(made, spec, pa.record_batch({"image": pa.array(encoded, pa.binary())}))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == {4: "invalid_image", 6: "missing_value"}
    names = ["red", "green", "blue"]
    assert table.column("label").to_pylist() == [names[at % 3] for at in range(10) if at not in failures]


def too_much_for_more_than_two(first: str) -> tuple[list[Any], list[Any]]:
    """Nodes that make ``nothing``, a zero, for up to two rows of ``first``, and ask for 4 PiB for more: no machine's
    addresses reach as far."""
    nodes = [
        helper.make_node("Shape", [first], ["n"], start=0, end=1),
        helper.make_node("Greater", ["n", "two"], ["many"]),
        helper.make_node("Where", ["many", "immense", "one"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["memory"]),
        helper.make_node("ReduceMax", ["memory"], ["nothing"], keepdims=0),
    ]
    sizes = {"one": 1, "two": 2, "immense": 2**50}
    return nodes, [helper.make_tensor(name, INT64, [1], [size]) for name, size in sizes.items()]


def test_a_batch_that_memory_does_not_hold_is_halved_and_so_are_those_after_it(tmp_path: Path) -> None:
    nodes, constants = too_much_for_more_than_two("x")
    nodes.append(helper.make_node("Add", ["x", "nothing"], ["y"]))
    path = graph(tmp_path / "m.onnx", nodes, [value("x", FLOAT, ["N"])], [value("y", FLOAT, ["N"])], constants)
    made = engine(path, SPEC, tmp_path, autotune=False, lanes=1)
    data = np.arange(64, dtype=np.float32)
    for _ in range(6):
        table, failures = run(made, SPEC, pa.record_batch({"x": data}), size=64)
        assert not failures and table.column("y").to_pylist() == data.tolist()
    stats = made.stats()
    runs = stats["runs"]
    run(made, SPEC, pa.record_batch({"x": data}), size=64)
    after = made.stats()
    made.close()
    assert stats["batch_halvings"] >= 5
    looked_at = after["compared_rows"] - stats["compared_rows"]  # run alone besides
    assert (
        after["runs"] - runs - looked_at == 32 and after["batch_halvings"] == stats["batch_halvings"]
    )  # two by two, none in vain


def test_texts_that_memory_does_not_hold_halve_the_budget(tmp_path: Path) -> None:
    build_encoder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    nodes, constants = too_much_for_more_than_two("input_ids")
    nodes += [
        helper.make_node("Cast", ["input_ids"], ["f"], to=FLOAT),
        helper.make_node("Add", ["f", "nothing"], ["g"]),
        helper.make_node("Unsqueeze", ["g", "two"], ["last_hidden_state"]),
    ]
    inputs, outputs = [value("input_ids", INT64, ["n", "s"])], [value("last_hidden_state", FLOAT, ["n", "s", 1])]
    graph(tmp_path / "m" / "model.onnx", nodes, inputs, outputs, constants)
    spec = job("embed", pooling="mean", normalize=False)
    texts = [f"red dog {word}" for word in ("cat", "fox", "sun", "sea")] * 2 + ["red"] * 3
    alone = engine(tmp_path / "m", spec, tmp_path, autotune=False, max_batch=1)
    expected, _ = run(alone, spec, column(texts))
    alone.close()
    made = engine(tmp_path / "m", spec, tmp_path, autotune=False, lanes=1)
    budget = made.stats()["token_budget"]
    table, failures = run(made, spec, column(texts))
    stats = made.stats()
    made.close()
    assert not failures and (embeddings(table) == embeddings(expected)).all()
    assert stats["budget_halvings"] >= 1 and stats["token_budget"] <= budget // 2


@pytest.mark.parametrize("kind", ["bfloat16", "float8e4m3fn"])
@pytest.mark.parametrize("way", ["both in", "string in", "narrow in"])
def test_strings_beside_types_that_numpy_has_not(tmp_path: Path, kind: str, way: str) -> None:
    """ONNX Runtime takes the ones by binding only, and the others by anything but a binding."""
    element = getattr(TensorProto, kind.upper())
    words, numbers = ["a", "", "ü" * 40, "a"], [1.0, -2.0, 0.5, 448.0]
    columns: dict[str, Any] = {}
    nodes, inputs = [], []
    outputs = [value("t", STRING, ["N"]), value("y", element, ["N"])]
    if way == "narrow in":
        inputs.append(value("x", element, ["N"]))
        nodes += [helper.make_node("Cast", ["x"], ["f"], to=FLOAT), helper.make_node("Cast", ["f"], ["t"], to=STRING)]
    else:
        inputs.append(value("s", STRING, ["N"]))
        nodes.append(helper.make_node("Identity", ["s"], ["t"]))
        columns["s"] = pa.array(words)
    if way == "string in":
        nodes += [
            helper.make_node("Equal", ["s", "a"], ["same"]),
            helper.make_node("Cast", ["same"], ["y"], to=element),
        ]
    else:
        if way == "both in":
            inputs.append(value("x", element, ["N"]))
        nodes.append(helper.make_node("Identity", ["x"], ["y"]))
        columns["x"] = pa.array(numbers, pa.float32())
    constants = [helper.make_tensor("a", STRING, [], [b"a"])] if way == "string in" else []
    path = graph(tmp_path / "m.onnx", nodes, inputs, outputs, constants, opset=21)
    made = engine(path, SPEC, tmp_path, io_binding=True)
    table, failures = run(made, SPEC, pa.record_batch(columns))
    made.close()
    assert not failures
    assert table.column("y").to_pylist() == ([1.0, 0.0, 0.0, 1.0] if way == "string in" else numbers)
    found = table.column("t").to_pylist()
    assert [float(text) for text in found] == numbers if way == "narrow in" else found == words


def test_strings_of_any_shape_pass_the_detour() -> None:
    for shape in [(0,), (), (2, 3), (2, 0, 1)]:
        array = np.full(shape, "é", np.object_)
        found = low_precision.strings(array)
        assert tuple(found.shape()) == shape and np.asarray(found.numpy()).tolist() == array.tolist()


@pytest.mark.parametrize("place", ["input", "output"])
@pytest.mark.parametrize("what", ["sequence", "optional"])
def test_values_that_are_no_tensors_are_refused_by_name(tmp_path: Path, what: str, place: str) -> None:
    tensor = helper.make_tensor_type_proto(FLOAT, ["N"])
    make = helper.make_sequence_type_proto if what == "sequence" else helper.make_optional_type_proto
    odd = helper.make_value_info("odd", make(tensor))
    flat = value("flat", FLOAT if place == "output" or what == "sequence" else BOOL, None)
    if place == "input":
        operator = ("SequenceAt", ["odd", "zero"]) if what == "sequence" else ("OptionalHasElement", ["odd"])
        nodes, inputs, outputs = [helper.make_node(*operator, ["flat"])], [odd], [flat]
    else:
        operator = ("SequenceConstruct", ["flat"]) if what == "sequence" else ("Optional", ["flat"])
        nodes, inputs, outputs = [helper.make_node(*operator, ["odd"])], [flat], [odd]
    path = graph(tmp_path / "m.onnx", nodes, inputs, outputs, [helper.make_tensor("zero", INT64, [], [0])])
    with pytest.raises(InvalidModel, match=f"{place} 'odd' is a {what}_type"):
        OnnxEngine.check(SPEC, model_at(path), pa.schema([pa.field("flat", pa.float32())]))
    with pytest.raises(InvalidModel, match=r"'odd' is a (seq|optional)\(|cannot load"):
        engine(path, SPEC, tmp_path)
