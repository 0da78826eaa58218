"""A job of a million rows on SQLite, killed ten times with ``kill -9`` at random moments, and run again each time.

The ``fake`` engine counts every row that it computes, also those that nobody ever sees. What is computed twice is what
had not been flushed when the process died: at most ``flush_rows`` a kill.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.jobs.memory import ROWMILL, write_input
from pipeline import Client
from pipeline.config.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="rowmill-kills-") as name:
        folder = Path(name)
        settings = Settings(data_dir=folder / "data", cache_dir=folder / "cache")
        source, counter = folder / "in.parquet", folder / "computed"
        write_input(source, options.rows)
        counter.touch()
        command = [
            ROWMILL,
            "run",
            str(source),
            "-o",
            str(folder / "out"),
            "-m",
            "fake",
            "-t",
            "generate",
            "-p",
            "{text}",
        ]
        command += ["--set", f"rows_file={counter}", "--quiet", "--data-dir", str(settings.data_dir)]
        for _ in range(options.kills):
            left = options.rows - counter.stat().st_size
            goal = counter.stat().st_size + chance.randint(1, max(1, 2 * left // (options.kills + 1)))
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while counter.stat().st_size < goal and process.poll() is None:
                time.sleep(0.001)
            process.kill()
            process.wait()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        with Client(settings=settings) as client:
            [status] = client.jobs()
            attempts = client.job(status.id).attempts()
        computed = counter.stat().st_size
        ids = pq.read_table(folder / "out" / "data", columns=["id"])["id"].to_pylist()
    flushed = sum(attempt.rows_computed for attempt in attempts)
    lost = sum(attempt.state == "lost" for attempt in attempts)
    allowed = options.rows + options.kills * settings.flush_rows
    print(f"{options.rows:,} rows, {options.kills} kills, {len(attempts)} attempts, {lost} of them lost")
    print(f"computed {computed:,} rows: {computed - options.rows:,} more than there are; flushed {flushed:,}")
    print(f"allowed  {allowed:,} rows ({settings.flush_rows:,} a kill)")
    whole = ids == list(range(options.rows))
    print(f"output   {len(ids):,} rows, {'each once and in order' if whole else 'NOT each once and in order'}")
    sys.exit(0 if whole and computed <= allowed and flushed == options.rows else 1)


if __name__ == "__main__":
    main()
