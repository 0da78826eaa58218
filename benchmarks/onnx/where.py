"""Where the processor's time goes in a job of texts to embeddings: the graph, and everything around it.

Processor seconds of the threads that run each part, so that a busy machine distorts little. What Rust does in threads
of its own (tokenization), and what nobody claims, is the rest of the process.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.onnx.__main__ import corpus
from benchmarks.onnx.models import graphs, minilm
from benchmarks.onnx.variants import rowmill


class Clock:
    """Adds up the thread time inside functions that it is put around."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def around(self, owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def timed(*values: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return inner(*values, **named)
            finally:
                with self._lock:
                    self.seconds[label] += time.thread_time() - began

        setattr(owner, name, timed)


def clocked() -> Clock:
    from pipeline.engines.onnx.models import text_model, tokenizer
    from pipeline.engines.onnx.runtime import run
    from pipeline.execution import assemble_shard, flush
    from pipeline.worker import embedded

    clock = Clock()
    clock.around(run.Lane, "run_one", "graph (ONNX Runtime)")
    clock.around(text_model.TextModel, "_feed", "padding and copies in")
    clock.around(text_model.TextModel, "vectors", "pooling and scaling")
    clock.around(text_model.TextModel, "values", "result columns")
    clock.around(text_model, "distinct", "duplicates")
    clock.around(tokenizer.TextTokenizer, "encode", "tokenization, the Python side")
    clock.around(flush.Flusher, "_flush", "part files (Parquet, hash, database)")
    clock.around(assemble_shard, "_assemble", "assembling the output (Parquet)")
    clock.around(embedded, "finalize_job", "publishing")
    clock.around(embedded, "job_status", "progress")
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000)
    rows = parser.parse_args().rows
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    with tempfile.TemporaryDirectory(prefix="rowmill-onnx-") as name:
        folder = Path(name)
        texts = corpus(rows, minilm())
        pq.write_table(pa.table({"text": texts}), folder / "texts.parquet")
        pq.write_table(pa.table({"text": texts[:100]}), folder / "warm.parquet")
        clock = clocked()
        turn = rowmill(graphs(folder).float32, {"autotune": False}, folder / "rowmill")
        turn(folder / "warm.parquet", folder / "warm")
        clock.seconds.clear()
        before = resource.getrusage(resource.RUSAGE_SELF)
        turn(folder / "texts.parquet", folder / "out")
        after = resource.getrusage(resource.RUSAGE_SELF)
    total = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    clock.seconds["everything else"] = total - sum(clock.seconds.values())
    print(f"{rows} rows, {total:.2f} processor seconds")
    for label, seconds in clock.seconds.most_common():
        print(f"{label:40} {seconds:8.3f} s  {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
