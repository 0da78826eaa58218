"""Inputs and models of ``benchmarks.rows``: workloads whose model costs next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import TensorProto, helper, numpy_helper

from benchmarks.jobs.memory import write_input

CHUNK = 65_536
"""Rows of a row group."""
FEATURES, HIDDEN = 20, 32
NGRAMS, BUCKETS, CLASSES = 32, 2**16, 8
WIDE = 100


@dataclass(frozen=True, slots=True)
class Workload:
    """``write(path, rows)`` makes the input, ``model(path)`` the graph (``None``: the fake engine). ``arguments`` are
    those of ``rowmill run`` beyond input, output and model."""

    title: str
    write: Callable[[Path, int], None]
    model: Callable[[Path], None] | None
    arguments: tuple[str, ...]


def _write(path: Path, rows: int, chunk: Callable[[int, int], pa.RecordBatch]) -> None:
    writer = None
    for start in range(0, rows, CHUNK):
        batch = chunk(start, min(CHUNK, rows - start))
        writer = writer or pq.ParquetWriter(path, batch.schema, compression="zstd")
        writer.write_batch(batch)
    if writer is not None:
        writer.close()


def _fixed(values: Any, size: int) -> pa.Array[Any]:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size)


def write_floats(path: Path, rows: int) -> None:
    """``id: int64``, ``x: fixed_size_list<float32>[20]``."""
    random = np.random.default_rng(0)

    def chunk(start: int, n: int) -> pa.RecordBatch:
        x = random.standard_normal((n, FEATURES), np.float32)
        return pa.record_batch({"id": pa.array(np.arange(start, start + n)), "x": _fixed(x, FEATURES)})

    _write(path, rows, chunk)


def write_ngrams(path: Path, rows: int) -> None:
    """``id: int64``, ``ngrams: fixed_size_list<int64>[32]``: buckets that n-grams of a text were hashed to."""
    random = np.random.default_rng(0)

    def chunk(start: int, n: int) -> pa.RecordBatch:
        # Few n-grams are frequent, most are rare.
        found = np.minimum(random.zipf(1.3, (n, NGRAMS)), BUCKETS) - 1
        return pa.record_batch({"id": pa.array(np.arange(start, start + n)), "ngrams": _fixed(found, NGRAMS)})

    _write(path, rows, chunk)


def write_wide(path: Path, rows: int) -> None:
    """100 columns: a fifth each of float64, int32, booleans, short texts of few values, longer texts of many."""
    random = np.random.default_rng(0)
    words = np.array([f"word-{number}" for number in range(2000)])

    def column(number: int, n: int) -> Any:
        match number % 5:
            case 0:
                return random.standard_normal(n)
            case 1:
                return random.integers(0, 10**6, n, np.int32)
            case 2:
                return random.integers(0, 2, n).astype(bool)
            case 3:
                return pa.array(words[random.integers(0, 50, n)])
            case _:
                return pa.array(np.char.add(words[random.integers(0, 2000, n)], words[random.integers(0, 2000, n)]))

    _write(path, rows, lambda start, n: pa.record_batch({f"c{i:03}": column(i, n) for i in range(WIDE)}))


def _save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any]) -> None:
    held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_mlp(path: Path) -> None:
    """20 → 32 → 32 → 1, float32."""
    random = np.random.default_rng(1)
    sizes = (FEATURES, HIDDEN, HIDDEN, 1)
    weights: dict[str, Any] = {}
    nodes, last = [], "x"
    for at, (n_in, n_out) in enumerate(pairwise(sizes)):
        weights |= {f"w{at}": (random.standard_normal((n_in, n_out)) / np.sqrt(n_in)).astype(np.float32)}
        weights |= {f"b{at}": np.zeros(n_out, np.float32)}
        end = "y" if n_out == 1 else f"a{at}"
        nodes.append(helper.make_node("Gemm", [last, f"w{at}", f"b{at}"], [end if n_out == 1 else f"g{at}"]))
        if n_out != 1:
            nodes.append(helper.make_node("Relu", [f"g{at}"], [end]))
        last = end
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", FEATURES])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])
    _save(path, nodes, [x], [y], weights)


def write_classifier(path: Path) -> None:
    """The mean of the n-grams' rows of one matrix, and its softmax."""
    random = np.random.default_rng(1)
    weights = {"matrix": random.standard_normal((BUCKETS, CLASSES)).astype(np.float32), "axes": np.array([1], np.int64)}
    nodes = [
        helper.make_node("Gather", ["matrix", "ngrams"], ["rows"], axis=0),
        helper.make_node("ReduceMean", ["rows", "axes"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["p"], axis=-1),
    ]
    ngrams = helper.make_tensor_value_info("ngrams", TensorProto.INT64, ["n", NGRAMS])
    p = helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", CLASSES])
    _save(path, nodes, [ngrams], [p], weights)


WORKLOADS = {
    "mlp": Workload("an MLP over 20 float32", write_floats, write_mlp, ("-t", "tensor")),
    "ngrams": Workload(
        "a classifier of one matrix over 32 hashed n-grams", write_ngrams, write_classifier, ("-t", "tensor")
    ),
    "fake": Workload(
        "the fake engine over texts of 200 bytes", write_input, None, ("-t", "generate", "-p", "{text}", "--keep", "id")
    ),
    "wide": Workload("100 mixed columns that are only kept", write_wide, None, ("-t", "tensor", "--input", "x=c000")),
}
