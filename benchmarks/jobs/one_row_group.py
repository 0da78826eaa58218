"""CPU seconds to read a million rows in 20 shards: from one row group of 10⁶ rows, and from row groups of 50,000.

A Parquet row group can only be decoded from its start. What one shard after another costs, because each lies further
into the same group, is the ratio of the two. The runs alternate, and the median of the pairs' ratios is the result;
``--fresh`` reads each shard as another worker process would, with nothing left open by the one before.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.jobs.memory import write_input
from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.records import Slice, Source

ROWS, SHARDS = 10**6, 20


def cpu_seconds(path: Path, *, fresh: bool) -> float:
    """CPU time of reading all rows' texts, shard by shard."""
    store = ObjectStore()
    info, stats = store.info(str(path)), parquet.stats(store, str(path))
    source = Source(0, info.uri, info.etag, info.n_bytes, stats.n_rows)
    size, seen = ROWS // SHARDS, 0
    began = time.process_time()
    for shard in range(SHARDS):
        store = ObjectStore() if fresh else store
        batches = parquet.read(
            store,
            {0: source},
            [Slice(0, shard * size, size)],
            schema=stats.schema,
            columns=["text"],
            only=None,
            batch_rows=1024,
            batch_bytes=16 * 2**20,
        )
        seen += sum(len(rows) for rows, _ in batches)
    seconds = time.process_time() - began
    assert seen == ROWS, seen
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rowmill-row-group-") as name:
        one, many = Path(name) / "one.parquet", Path(name) / "many.parquet"
        write_input(one, ROWS, ROWS)
        write_input(many, ROWS, ROWS // SHARDS)
        pairs = [
            (cpu_seconds(one, fresh=options.fresh), cpu_seconds(many, fresh=options.fresh))
            for _ in range(options.pairs)
        ]
    for large, small in pairs:
        print(f"one row group {large:6.2f} s   groups of {ROWS // SHARDS:,} {small:6.2f} s   ratio {large / small:.2f}")
    print(f"median ratio {statistics.median(large / small for large, small in pairs):.2f}")


if __name__ == "__main__":
    main()
