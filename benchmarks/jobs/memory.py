"""Peak memory must not grow with the number of rows: an embedded run of 10⁶ rows against one of 10⁵.

Each run is ``rowmill run`` with the ``fake`` engine in a process of its own, on an input of 200-byte texts, so that
holding on to rows would show: ten times the rows are 180 MB more. Peak memory is the kernel's ``ru_maxrss`` of that
process, or of the largest of its children.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWMILL = Path(sys.executable).with_name("rowmill")
TEXT_BYTES = 200
LIMIT = 1.2
"""Largest ratio that counts as the same."""


@dataclass(frozen=True, slots=True)
class Measured:
    """``peak`` in bytes, ``seconds`` of wall time for the whole command."""

    rows: int
    seconds: float
    peak: int


def write_input(path: Path, rows: int, chunk: int = 50_000) -> None:
    """``rows`` rows of ``id: int64`` and ``text: string`` of 200 random letters, in row groups of ``chunk`` rows."""
    fields: list[pa.Field[Any]] = [pa.field("id", pa.int64()), pa.field("text", pa.string())]
    schema = pa.schema(fields)
    random = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, chunk):
            n = min(chunk, rows - start)
            letters = random.integers(97, 123, n * TEXT_BYTES, dtype=np.uint8)
            offsets = np.arange(0, (n + 1) * TEXT_BYTES, TEXT_BYTES, dtype=np.int32)
            text = pa.StringArray.from_buffers(n, pa.py_buffer(offsets.tobytes()), pa.py_buffer(letters.tobytes()))
            writer.write_batch(pa.record_batch([pa.array(np.arange(start, start + n)), text], schema=schema))


def measure(rows: int, folder: Path, order: str) -> Measured:
    """Run the command on ``rows`` rows in a fresh process and check that it wrote them all."""
    source, output = folder / f"{rows}.parquet", folder / f"output-{rows}"
    write_input(source, rows)
    arguments = ["run", str(source), "-o", str(output), "-m", "fake", "-t", "generate", "-p", "{text}", "--quiet"]
    arguments += ["--data-dir", str(folder / "data"), "--order", order]
    started = time.monotonic()
    process = subprocess.Popen([ROWMILL, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"rowmill run ended with {process.returncode}")
    written = sum(pq.read_metadata(path).num_rows for path in (output / "data").glob("*.parquet"))
    if written != rows:
        sys.exit(f"{written} rows were written, not {rows}")
    return Measured(rows, seconds, usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[10**5, 10**6], metavar=("FEW", "MANY"))
    parser.add_argument("--order", default="auto", help="prefix: all rows are regrouped first, and merged at the end")
    options = parser.parse_args()
    few_rows, many_rows = options.rows
    with tempfile.TemporaryDirectory(prefix="rowmill-memory-") as folder:
        few, many = (measure(rows, Path(folder), options.order) for rows in (few_rows, many_rows))
    print(f"{'rows':>10}  {'seconds':>8}  {'rows/s':>8}  {'peak MiB':>8}")
    for run in (few, many):
        print(f"{run.rows:>10,}  {run.seconds:>8.1f}  {run.rows / run.seconds:>8,.0f}  {run.peak / 2**20:>8.0f}")
    ratio = many.peak / few.peak
    print(f"peak memory grew by a factor of {ratio:.2f} (limit {LIMIT})")
    sys.exit(1 if ratio > LIMIT else 0)


if __name__ == "__main__":
    main()
