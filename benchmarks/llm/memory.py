"""Memory of an embedded vLLM worker over 10⁵ requests: this process, and the engine's beside it.

A tiny Llama answers one token to each row; 20 shards, two at a time. Resident memory is taken every second; what counts
is the growth from the end of the first quarter of the rows (by then every buffer has been used) to the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from examples.tiny_llama import build_llama
from pipeline import Client
from pipeline.config.settings import Settings

MOST_GROWTH = 1.10
MIB = 2**20


def resident() -> tuple[int, int]:
    """Bytes of this process, and of its children."""
    own = psutil.Process()
    others = 0
    for child in own.children(recursive=True):
        try:
            others += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return own.memory_info().rss, others


def plot(samples: Sequence[tuple[int, int, int]], path: Path) -> None:
    """Both curves, MiB over rows."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "rowmill"  # the same numbers, the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 2.8))
    rows = [sample[0] for sample in samples]
    for at, name, color in ((2, "the engine's processes", "#8b949e"), (1, "the worker", "#1f6feb")):
        axes.plot(rows, [sample[at] / MIB for sample in samples], label=name, color=color)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("rows done")
    axes.set_ylabel("resident memory, MiB")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--plot", type=Path, help="draw the memory over the rows into this file (needs matplotlib)")
    options = parser.parse_args()
    began = time.monotonic()
    samples: list[tuple[int, int, int]] = []
    with tempfile.TemporaryDirectory(prefix="rowmill-llm-memory-") as name:
        folder = Path(name)
        model = build_llama(folder / "llama")
        source = folder / "in.parquet"
        pq.write_table(pa.table({"text": [f"parcel {n}" for n in range(options.rows)]}), source, row_group_size=2000)
        with Client(settings=Settings(data_dir=folder / "data", cache_dir=folder / "cache")) as client:
            job = client.submit(
                input=str(source),
                output=str(folder / "out"),
                model=str(model),
                task="generate",
                prompt="{text}",
                engine_options={"dtype": "float32"},
                sampling={"max_tokens": 1, "temperature": 0},
                shard_rows=options.rows // 20,
            )
            while not (status := job.status()).terminal:
                samples.append((status.rows_done, *resident()))
                job._client._running[job.id].join(1.0)
            if status.rows_done != options.rows:
                sys.exit(f"{status.state}: {status.rows_done:,} rows of {options.rows:,}; {status.error}")
    print(f"{options.rows:,} rows in {time.monotonic() - began:.0f} s, the engine's start included")
    if options.plot is not None:
        plot(samples, options.plot)
    failed = False
    for at, who in ((1, "worker"), (2, "engine")):
        early = [sample[at] for sample in samples if 0.25 <= sample[0] / options.rows < 0.5]
        late = [sample[at] for sample in samples if sample[0] / options.rows >= 0.75]
        if not early or not late:
            sys.exit("it was over too soon to say; take more rows")
        first, last = statistics.median(early), statistics.median(late)
        failed |= last > MOST_GROWTH * first
        most = max(sample[at] for sample in samples)
        print(
            f"{who}: {first / MIB:,.0f} MiB in the second quarter, {last / MIB:,.0f} MiB in the last "
            f"({last / first:.3f} of it), at most {most / MIB:,.0f} MiB"
        )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
