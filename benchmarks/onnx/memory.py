"""Memory of an ONNX Runtime engine over 500 random shapes: a plateau, not a slope.

Every batch has a shape of its own, [rows, length, 64] with rows up to 64 and length up to 512, through a graph of
matrix products whose intermediate results are several times as large. After each batch the resident memory of the
process is noted. The promise: the most of the last 250 batches is at most 15% above the most of the first 250.

``--plot FILE`` writes the curve as SVG.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import psutil
import pyarrow as pa
from onnx import TensorProto, helper

BATCHES = 500
WIDTH = 64
LIMIT = 1.15
"""Largest ratio that counts as a plateau."""


def build(path: Path) -> Path:
    """x [N, L, 64] → y [N, 64]: attention of a sequence over itself, so that the memory of a run grows with L²."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=2),
        helper.make_node("MatMul", ["weights", "x"], ["mixed"]),
        helper.make_node("ReduceMean", ["mixed", "axis"], ["y"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "L", WIDTH])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", WIDTH])]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [axis])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(path))
    return path


def child(folder: Path) -> None:
    """Run the batches in this process, and print the resident memory after each, in bytes."""
    from pipeline.engines.base import Cancellation, EngineContext, RowBatch
    from pipeline.engines.onnx.engine import OnnxEngine
    from pipeline.models.resolve import resolve
    from pipeline.spec.job_spec import JobSpec, Task

    path = build(folder / "attention.onnx")
    spec = JobSpec(input=("rows.parquet",), output="out", model=str(path), task=Task.TENSOR)
    engine = OnnxEngine(resolve(str(path), folder), spec.task, {"sessions": 1}, EngineContext(folder))
    engine.load()
    random = np.random.default_rng(0)
    values = random.normal(size=64 * 512 * WIDTH).astype(np.float32)
    process = psutil.Process()
    for _ in range(BATCHES):
        rows, length = int(random.integers(1, 65)), int(random.integers(1, 513))
        flat = pa.array(values[: rows * length * WIDTH])
        inner = pa.FixedSizeListArray.from_arrays(flat, WIDTH)
        column = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * length), inner)
        batch = RowBatch(np.arange(rows), pa.record_batch({"x": column}))
        done = sum(len(result.rows) for result in engine.infer(spec, [batch], Cancellation()))
        if done != rows:
            sys.exit(f"{done} of {rows} rows")
        print(process.memory_info().rss, flush=True)
    engine.close()


def plot(memory: Sequence[int], path: Path) -> None:
    """The curve as SVG, in MiB over batches."""
    wide, high, left, low = 640, 240, 48, 28
    top = max(memory) * 1.1
    xs = [left + (wide - left - 8) * i / (len(memory) - 1) for i in range(len(memory))]
    points = " ".join(f"{x:.1f},{high - low - (high - low - 8) * m / top:.1f}" for x, m in zip(xs, memory, strict=True))
    marks = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = high - low - (high - low - 8) * share
        marks.append(f'<line x1="{left}" x2="{wide - 8}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ccc"/>')
        marks.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{top * share / 2**20:.0f}</text>')
    for at in range(0, len(memory) + 1, 100):
        x = left + (wide - left - 8) * at / len(memory)
        marks.append(f'<text x="{x:.0f}" y="{high - 10}" text-anchor="middle">{at}</text>')
    title = f"resident memory in MiB, after each of {len(memory)} batches of random shape"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="11">',
        f'<rect width="{wide}" height="{high}" fill="#fff"/>',
        *marks,
        f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="1.5"/>',
        f'<text x="{left + 6}" y="16">{title}</text>',
        "</svg>",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.onnx.memory", "--child", folder]
        environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    memory = [int(line) for line in run.stdout.split()]
    first, last = max(memory[: BATCHES // 2]), max(memory[BATCHES // 2 :])
    start, first_half, second_half = (f"{value / 2**20:.0f}" for value in (memory[0], first, last))
    print(f"MiB after one batch {start}, the most of the first half {first_half}, of the second {second_half}")
    if arguments.plot is not None:
        plot(memory, arguments.plot)
    ratio = last / first
    print(f"ratio {ratio:.3f} (at most {LIMIT})")
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()
