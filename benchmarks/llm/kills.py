"""A vLLM engine that is killed five times while a job runs: the job completes, and each row is answered once.

The engine's process is killed (``kill -9``) when more rows have become durable since the last time. Reports the time
from a death to the next flush, engine start-up included.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from examples.tiny_llama import build_llama
from pipeline import Client
from pipeline.config.settings import Settings


def engine_process() -> int | None:
    """The process of the engine that runs now."""
    for child in psutil.Process().children():
        if child.name().startswith("VLLM::EngineCor") and child.status() != psutil.STATUS_ZOMBIE:
            return child.pid
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--kills", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rowmill-llm-kills-") as name:
        folder = Path(name)
        model = build_llama(folder / "llama")
        source = folder / "in.parquet"
        texts = [f"parcel {n}" for n in range(options.rows)]
        pq.write_table(pa.table({"id": range(options.rows), "text": texts}), source)
        settings = Settings(data_dir=folder / "data", cache_dir=folder / "cache", flush_rows=max(2, options.rows // 40))
        killed: list[tuple[float, int]] = []
        back: list[float] = []
        pid: int | None = None
        with Client(settings=settings) as client:
            job = client.submit(
                input=str(source),
                output=str(folder / "out"),
                model=str(model),
                task="generate",
                prompt="{text}",
                engine_options={"dtype": "float32", "max_num_seqs": 32},
                sampling={"max_tokens": 16, "temperature": 0, "ignore_eos": True},
                shard_rows=options.rows // 8,
            )
            while not (status := job.status()).terminal:
                durable = status.rows_done
                # What was finished before the death may be flushed after it: another engine has to be there, too.
                if (
                    killed
                    and len(back) < len(killed)
                    and durable > killed[-1][1]
                    and engine_process() not in (None, pid)
                ):
                    back.append(time.monotonic() - killed[-1][0])
                due = durable >= options.rows * (len(killed) + 1) // (options.kills + 2)
                if due and len(killed) < options.kills and len(back) == len(killed):
                    pid = engine_process()
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
                        killed.append((time.monotonic(), durable))
                        print(f"  killed at {durable:,} rows", file=sys.stderr, flush=True)
                job._client._running[job.id].join(0.1)
            if status.state != "completed" or status.rows_failed:
                sys.exit(f"{status.state}, {status.rows_failed} failed rows: {status.error}")
            table = job.table()
            failures = status.failures
        assert table.column("id").to_pylist() == list(range(options.rows)), "rows are lost, doubled or out of order"
        assert table.column("output").null_count == 0
        assert len(killed) == options.kills, f"the job was over after {len(killed)} kills; take more rows"
    print(f"{options.rows:,} rows, {options.kills} kills: completed, each row once, {failures} failed attempts")
    print(f"{statistics.median(back):.1f} s from a death to the next flush (median)")


if __name__ == "__main__":
    main()
