"""What resume points cost: one embedded run, flushing every 256 rows, every 4,096 (the default), and only at the end.

The ``fake`` engine answers at once, so that all of the time is the pipeline's own: with a real model the share of
flushing is smaller by as much as the model is slower. Runs alternate; medians of ``--pairs`` runs each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.jobs.memory import ROWMILL, write_input

INTERVALS = (256, 4096, 10**9)


def measure(source: Path, folder: Path, flush_rows: int) -> float:
    """Seconds of one run of ``rowmill run``, start-up included."""
    arguments = ["run", str(source), "-o", str(folder / "out"), "-m", "fake", "-t", "generate", "-p", "{text}"]
    limits = {"flush_rows": flush_rows, "flush_bytes": 2**40, "flush_seconds": 10**9}
    arguments += ["--overwrite", "--quiet", "--data-dir", str(folder / "data")]
    for name, value in limits.items():
        arguments += ["--setting", f"{name}={value}"]
    started = time.monotonic()
    subprocess.run([ROWMILL, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {interval: [] for interval in INTERVALS}
    with tempfile.TemporaryDirectory(prefix="rowmill-flush-") as folder:
        source = Path(folder) / "in.parquet"
        write_input(source, options.rows)
        measure(source, Path(folder), INTERVALS[-1])  # the first one warms the caches
        for _ in range(options.pairs):
            for interval in INTERVALS:
                seconds[interval].append(measure(source, Path(folder), interval))
    floor = statistics.median(seconds[INTERVALS[-1]])
    print(f"{options.rows:,} rows, medians of {options.pairs}")
    print(f"{'flush every':>14}  {'seconds':>8}  {'spread':>15}  {'against none':>12}  {'ms a flush':>10}")
    for interval, found in seconds.items():
        median = statistics.median(found)
        flushes = options.rows // interval
        cost = f"{1000 * (median - floor) / flushes:.1f}" if flushes else ""
        spread = f"{min(found):.2f} to {max(found):.2f}"
        name = f"{interval:,} rows" if flushes else "end of shard"
        print(f"{name:>14}  {median:>8.2f}  {spread:>15}  {median / floor:>12.2f}  {cost:>10}")


if __name__ == "__main__":
    sys.exit(main())
